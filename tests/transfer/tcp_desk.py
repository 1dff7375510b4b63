"""Both ends of a TCP handoff, played by hand."""

import asyncio
import contextlib

import numpy as np

from transfer.contract import Source
from transfer.layout import Epoch, KVLayout, Landing
from transfer.tcp import wire

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

    def __init__(self, receiver, blocks=(3, 1, 0), tokens=24):
        self.pool = np.zeros(4 * WIDE.block_bytes, np.uint8)
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
    """A client that speaks the protocol byte by byte."""

    def __init__(self, receiver):
        host, port = wire.host_and_port(receiver.endpoint)
        self._where = host, port
        self._layout = receiver.layout

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection(*self._where)
        return self

    async def __aexit__(self, *exit_):
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def greeted(self):
        self.say(wire.Hello(wire.VERSION, b"", self._layout.fingerprint))
        assert await self.hear() == wire.Welcome(wire.VERSION)
        return self

    def say(self, message, payload=0):
        self.writer.write(wire.frame(message, payload))

    async def hear(self):
        async with asyncio.timeout(5):
            size, payload = wire.PREFIX.unpack(await self.reader.readexactly(wire.PREFIX.size))
            assert payload == 0
            return wire.to_sender(await self.reader.readexactly(size))

    async def closed(self):
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                await self.reader.read()
        return True


def opening(landing, ticket=0):
    return wire.Open(ticket, landing.id, landing.epoch, landing.secret)


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
