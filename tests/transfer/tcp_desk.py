"""Both ends of a handoff, played by hand: over TCP, and as far as they are alike over others."""

import asyncio
import contextlib
import hashlib
import hmac

import msgspec
import numpy as np

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import Source
from transfer.layout import Epoch, KVLayout, Landing
from transfer.nixl import wire as nixl
from transfer.session import wire as session
from transfer.shm import wire as shm
from transfer.tcp import wire

EVERYTHING = msgspec.msgpack.Decoder(session.Greeting | session.ToReceiver | session.ToSender)

# Runs of 16 KiB, so that they are received in place.
WIDE = KVLayout(
    model="wide",
    weights="float32",
    layers=2,
    kv_heads=4,
    head_dim=64,
    dtype="float32",
    block_tokens=8,
    rope="half",
)


class Owner:
    """Expects a landing in WIDE and remembers what it is told."""

    def __init__(self, receiver, blocks=(3, 1, 0), tokens=24, heads=None, pool=None):
        self.pool = np.zeros(4 * WIDE.block_bytes, np.uint8) if pool is None else pool
        self.touches, self.arrivals, self.failures = 0, [], []
        self.landing = Landing(
            id="wide",
            epoch=Epoch(1, 1),
            secret=b"s" * 16,
            worker="decode",
            endpoints=(receiver.endpoint,),
            layout=WIDE,
            pool_blocks=4,
            blocks=blocks,
            tokens=tokens,
            lease_seconds=60.0,
            heads=heads,
        )
        receiver.expect(
            self.landing,
            self.pool,
            touched=self.touch,
            arrived=lambda it: self.arrivals.append(it) or b"",
            failed=self.failures.append,
        )

    def touch(self):
        self.touches += 1


class Stranger:
    """A client that speaks the protocol byte by byte. `lane` is its further connection, if any."""

    def __init__(self, receiver):
        self._endpoint = receiver.endpoint
        self._layout = receiver.layout
        self._lanes = []
        self.lane = None

    async def __aenter__(self):
        self.reader, self.writer = await self._dial()
        return self

    async def _dial(self):
        if self._endpoint.transport == "shm":
            return await asyncio.open_unix_connection(shm.path_of(self._endpoint))
        host, _, port = self._endpoint.address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def __aexit__(self, *exit_):
        for writer in (self.writer, *self._lanes):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def greeted(self, secret=b""):
        """Be welcomed, and open a further connection where the transport has one."""
        blob = b""
        if self._endpoint.transport == "nixl":
            blob = msgspec.msgpack.encode(nixl.Greeting("c", nixl.Process.here(), True))
        said = hashlib.sha256(b"baton session")
        hello = session.Hello(session.VERSION, self._layout.fingerprint, b"n")
        self.say(hello)
        said.update(session.frame(hello))
        said.update(session.frame(await self.hear()))
        mac = hmac.digest(secret, b"sender" + said.digest() + blob, "sha256")
        self.say(session.Proof(mac, blob))
        welcome = await self.hear()
        assert isinstance(welcome, session.Welcome)
        self.welcome = welcome
        if self._endpoint.transport != "shm":
            self.lane = await self.join(welcome.token)
        return self

    async def join(self, token):
        _, lane = await self._dial()
        self._lanes.append(lane)
        lane.write(session.frame(session.Join(token)))
        return lane

    def say(self, message):
        self.writer.write(session.frame(message))

    def write(self, ticket, offsets, lengths, payload_bytes=None):
        """The beginning of a frame; its payload is the caller's."""
        size = int(lengths.sum()) if payload_bytes is None else payload_bytes
        self.lane.write(wire.head(ticket, offsets, lengths, size))

    async def hear(self):
        """The next message that says something."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                prefix = await self.reader.readexactly(session.PREFIX.size)
                body = await self.reader.readexactly(*session.PREFIX.unpack(prefix))
                message = EVERYTHING.decode(body)
                if not isinstance(message, session.Alive):
                    return message

    async def closed(self):
        async with asyncio.timeout(PATIENCE_SECONDS):
            with contextlib.suppress(ConnectionResetError):
                await self.reader.read()
        return True


def opening(landing, ticket=0, *, ask=False):
    return session.Open(ticket, landing.id, landing.epoch, landing.secret, ask, landing.place)


def runs(*pairs):
    offsets, lengths = zip(*pairs, strict=True)
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def wide_source(blocks=(1, 2, 0), tokens=24):
    pool = np.random.default_rng(5).integers(0, 256, 3 * WIDE.block_bytes, dtype=np.uint8)
    return Source(WIDE, pool, 3, blocks, tokens)


def landing_at(endpoint, tokens=24):
    blocks = tuple(range(WIDE.blocks_for(tokens)))
    return Landing(
        id="fake",
        epoch=Epoch(1, 1),
        secret=b"",
        worker="decode",
        endpoints=(endpoint,),
        layout=WIDE,
        pool_blocks=len(blocks),
        blocks=blocks,
        tokens=tokens,
        lease_seconds=60.0,
    )
