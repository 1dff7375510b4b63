"""Strangers and peers that send garbage to a live receiver, while a handoff goes on beside them."""

import asyncio
import contextlib
import struct
import threading

import msgspec
import numpy as np
import pytest
from ends import TRANSPORTS, receiver_of, sender_of
from hypothesis import strategies as st
from tcp_desk import WIDE, Owner, Stranger, opening, runs, wide_source

from tests.support.garbage import examples, garbage
from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import KVSlice, whole
from transfer.layout import Epoch, Landing
from transfer.nixl import available
from transfer.nixl import wire as nixl
from transfer.session import wire as session
from transfer.shared_memory import allocate
from transfer.stage import eventually
from transfer.tcp import TcpReceiver, wire

COUNT = 120
STALL_SECONDS = 2.0
BLOCK = WIDE.block_bytes
GREETINGS = [
    session.frame(it)
    for it in (
        session.Hello(session.VERSION, WIDE.fingerprint, b"n" * 32),
        session.Proof(b"m" * 32, b"blob"),
        session.Join(b"t" * 32),
    )
]
SAYINGS = [
    session.frame(it)
    for it in (
        session.Open(0, "theirs", Epoch(1, 2), b"t" * 16, False),
        session.Open(0, "wide", Epoch(1, 1), b"guess", True),
        session.Touch(0),
        session.Commit(0, b"d" * 16, b"s" * 16, struct.pack("<Q", 64), b"note"),
        session.Released(0, False),
        session.Echo(1),
        session.Alive(),
    )
]
HEADS = [
    wire.head(0, *runs((BLOCK, 64)), 64) + b"\xaa" * 64,
    wire.head(0, *runs((0, 8192), (8192, 8192)), 16384) + b"\xaa" * 16384,
    wire.head(wire.NOBODY, *runs((0, 64)), 64) + b"\xaa" * 64,
    wire.head(0, *runs((0, 2**62), (64, 2**62)), 64) + b"\xaa" * 64,
    wire.head_of_part(0, KVSlice(0, 0, 8, 2), 2 * BLOCK) + b"\xaa" * 2 * BLOCK,
    wire.head_of_part(0, KVSlice(1, 5, 9), 9) + b"\xaa" * 9,
    wire.HEAD.pack(0, wire.MAX_RUNS, wire.MAX_PAYLOAD_BYTES, 0, 0, 0, 0),
]


QUESTIONS = [
    nixl.PREFIX.pack(len(body)) + body
    for body in map(
        msgspec.msgpack.encode,
        (
            nixl.Busy(True),
            nixl.Where(0, False),
            nixl.Where(0, True),
            nixl.Ingest(0, 1, *(it.tobytes() for it in runs((2 * BLOCK, 64)))),
            nixl.Ingest(0, nixl.SLOTS, *(it.tobytes() for it in runs((2 * BLOCK, 64)))),
            nixl.Ingest(0, 0, *(it.tobytes() for it in runs((BLOCK, 64), (2**62, 2**62)))),
        ),
    )
]
KINDS = [("tcp", "session"), ("tcp", "data"), ("shm", "session")]
KINDS += [
    pytest.param("nixl", it, marks=pytest.mark.skipif(not available(), reason="needs NIXL"))
    for it in ("session", "data")
]


def streams(messages):
    return examples(st.lists(garbage(messages), min_size=1, max_size=3).map(b"".join), COUNT)


def threads():
    """How many threads transports have."""
    return sum(it.name.startswith("kv-") for it in threading.enumerate())


@contextlib.asynccontextmanager
async def undisturbed(transport="tcp"):
    """A receiver, and a handoff to it that begins before and ends well after what happens inside.

    Whatever happens, nothing outside the two landings is written to, and all threads end.
    """
    pool = allocate(4 * BLOCK)
    before = threads()
    async with (
        receiver_of(transport, WIDE, 4, pool, stall_seconds=STALL_SECONDS) as receiver,
        sender_of(transport, stall_seconds=PATIENCE_SECONDS) as sender,
    ):
        owner, source = Owner(receiver, blocks=(3, 1, 0), pool=pool), wide_source()
        writer = await sender.open(owner.landing, source)
        parts = whole(WIDE.layers, 24)
        await writer.write(parts[0])
        yield receiver, pool
        for part in parts[1:]:
            await writer.write(part)
        await writer.commit(b"", PATIENCE_SECONDS)
        for here, there in zip(source.blocks, owner.landing.blocks, strict=True):
            ours = source.pool[here * BLOCK : (here + 1) * BLOCK]
            assert (owner.pool[there * BLOCK : (there + 1) * BLOCK] == ours).all()
        assert not owner.pool[2 * BLOCK : 3 * BLOCK].any()
        assert not owner.failures
    await eventually(lambda: threads() <= before, "a thread is left")


class Second:
    """A landing of which the peer that sends garbage knows the secret: blocks 1 and 2 of 4.

    Where there is but one `pool`, it is block 2 alone, which nobody else has.
    """

    def __init__(self, receiver, pool=None):
        self.pool = np.zeros(4 * BLOCK, np.uint8)
        blocks = (1, 2) if pool is None else (2,)
        self.ends = []
        self.landing = Landing(
            id="theirs",
            epoch=Epoch(1, 2),
            secret=b"t" * 16,
            worker="decode",
            endpoints=(receiver.endpoint,),
            layout=WIDE,
            pool_blocks=4,
            blocks=blocks,
            tokens=8 * len(blocks),
            lease_seconds=60.0,
        )
        self.receiver = receiver
        receiver.expect(
            self.landing,
            self.pool if pool is None else pool,
            touched=lambda: None,
            arrived=lambda _: self.ends.append("arrived") or b"",
            failed=lambda error: self.ends.append(type(error).__name__),
        )

    async def over(self):
        """Take it back; nothing lies outside its blocks, and it ended once at most."""
        self.receiver.withdraw("theirs")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.receiver.quiesce("theirs")
        assert not self.pool[:BLOCK].any()
        assert not self.pool[3 * BLOCK :].any()
        assert len(self.ends) <= 1
        assert "arrived" not in self.ends


def say_all(writer, data):
    writer.write(data)
    with contextlib.suppress(OSError):  # it may have been sent away before the end
        writer.write_eof()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_strangers_who_send_garbage_disturb_nobody(transport):
    garbled = streams(GREETINGS)  # beforehand, as it takes its time
    async with undisturbed(transport) as (receiver, _):
        for data in garbled:
            async with Stranger(receiver) as stranger:
                say_all(stranger.writer, data)
                assert await stranger.closed(), data


@pytest.mark.parametrize(("transport", "kind"), KINDS)
async def test_peers_who_send_garbage_are_lost_and_disturb_nobody(transport, kind):
    lane = kind == "data"
    garbled = streams((HEADS if transport == "tcp" else QUESTIONS) if lane else SAYINGS)
    async with undisturbed(transport) as (receiver, pool):
        for data in garbled:
            second = Second(receiver, None if transport == "tcp" else pool)
            async with Stranger(receiver) as peer:
                await peer.greeted()
                if lane:
                    peer.say(opening(second.landing))
                say_all(peer.lane if lane else peer.writer, data)
                assert await peer.closed(), data
            await second.over()


@pytest.mark.parametrize("count", [1, 3, 5, 40])
async def test_whoever_stops_within_a_message_is_lost_in_time(count):
    async with TcpReceiver(WIDE, stall_seconds=1.0) as receiver:
        async with Stranger(receiver) as stranger:
            stranger.writer.write(GREETINGS[0][:count])
            assert await stranger.closed()
        async with Stranger(receiver) as peer:
            await peer.greeted()
            peer.lane.write(HEADS[1][:count])
            assert await peer.closed()
