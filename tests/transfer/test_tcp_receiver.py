"""What a TCP receiver has to bear beyond what every transport promises."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap

import msgspec
import numpy as np
import pytest
from tcp_desk import WIDE, Owner, Stranger, landing_at, opening, runs, wide_source

from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS
from transfer.contract import KVSlice, Source, whole
from transfer.convert import Conversion
from transfer.digest import PrefixDigest, landing_key, seal
from transfer.errors import PeerLost, PeerMisbehaved
from transfer.layout import Epoch
from transfer.plan import plan
from transfer.session import wire as session
from transfer.stage import Pair, Stage, eventually
from transfer.tcp import TcpReceiver, wire


async def test_long_runs_are_received_in_place(sender):
    async with TcpReceiver(WIDE) as receiver:
        owner, source = Owner(receiver), wide_source()
        writer = await sender.open(owner.landing, source)
        for part in whole(WIDE.layers, 24):
            await writer.write(part)
        receipt = await writer.commit(b"", PATIENCE_SECONDS)
        assert receipt.bytes == 24 * WIDE.token_bytes
        block = WIDE.block_bytes
        for here, there in zip(source.blocks, owner.landing.blocks, strict=True):
            ours = source.pool[here * block : (here + 1) * block]
            assert (owner.pool[there * block : (there + 1) * block] == ours).all()
        assert not owner.pool[2 * block : 3 * block].any()


async def test_handoffs_larger_than_the_socket_s_buffer_arrive_side_by_side(sender):
    tokens, blocks = 1024, tuple(range(128))
    random = np.random.default_rng(6)
    pool = random.integers(0, 256, 128 * WIDE.block_bytes, dtype=np.uint8)
    async with TcpReceiver(WIDE) as receiver:
        await sender.connect(receiver.endpoint, WIDE, WIDE)
        [session] = sender._sessions.values()
        session.mover._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)

        async def hand_over(name):
            landing = msgspec.structs.replace(
                landing_at(receiver.endpoint, tokens), id=name, blocks=blocks[::-1]
            )
            there = np.zeros_like(pool)
            receiver.expect(
                landing,
                there,
                touched=lambda: None,
                arrived=lambda it: it.note,
                failed=lambda _: None,
            )
            writer = await sender.open(landing, Source(WIDE, pool, 128, blocks, tokens))
            for part in whole(WIDE.layers, tokens):
                await writer.write(part)
            receipt = await writer.commit(name.encode(), PATIENCE_SECONDS)
            assert receipt.answer == name.encode()
            wanted = pool.reshape(128, -1)[::-1]
            assert (there.reshape(128, -1) == wanted).all()

        async with asyncio.TaskGroup() as group:
            for name in ("a", "b", "c"):
                group.create_task(hand_over(name))
        assert len(receiver.landings) == 0


@pytest.mark.parametrize("run_bytes", [16384, 1024], ids=["in place", "staged"])
async def test_the_rest_of_a_write_under_way_is_drained_after_a_withdrawal(run_bytes):
    async with (
        TcpReceiver(WIDE, stall_seconds=LONG_SECONDS) as receiver,
        Stranger(receiver) as stranger,
    ):
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        stranger.write(0, *runs(*((at, run_bytes) for at in range(0, 32768, run_bytes))))
        stranger.lane.write(b"\xaa" * 20000)
        if run_bytes == 16384:
            await eventually(lambda: owner.pool[19999] == 0xAA, "it was not received in place")
        receiver.withdraw("wide")
        async with asyncio.timeout(PATIENCE_SECONDS):  # though the sender has said nothing
            await receiver.quiesce("wide")
        owner.pool[:] = 0xEE
        stranger.lane.write(b"\xaa" * 12768)
        gone = await stranger.hear()
        assert (gone.ticket, gone.outcome) == (0, "gone")
        stranger.say(session.Released(0, lost=False))
        again = Owner(receiver)
        stranger.say(opening(again.landing, 1))
        stranger.write(1, *runs((0, 64)))
        stranger.lane.write(b"\xbb" * 64)
        await eventually(lambda: again.pool[63] == 0xBB, "the connection is of no use any more")
        assert (owner.pool == 0xEE).all()
        assert not owner.failures


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(8),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", session.MAX_STRANGER_BYTES + 1),
        struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
        session.frame(session.Released(0, lost=False)),
        session.frame(session.Proof(b"", b"")),
        session.frame(session.Join(b"x" * 32)),
    ],
)
async def test_nonsense_closes_its_connection_and_no_other(receiver, sender, nonsense):
    stage = Stage(Pair(sender, receiver))
    writer = await sender.open(stage.landing, stage.source)
    async with Stranger(receiver) as stranger:
        stranger.writer.write(nonsense)
        assert await stranger.closed()
    await stage.write_all(writer)
    await writer.commit(b"", PATIENCE_SECONDS)


LAYER_BLOCK = WIDE.block_bytes // WIDE.layers
OUTSIDE = 2 * WIDE.block_bytes  # block 2 is not the landing's


@pytest.mark.parametrize(
    "lie",
    [
        wire.head(0, *runs((0, 64)), 65),
        wire.head(0, *runs((0, 64)), 63),
        wire.head(0, *runs((0, 64)), 0xFFFFFFFF),
        wire.head(0, *runs((0, 1 << 62), (0, 1 << 62), (0, 1 << 62), (0, (1 << 62) + 64)), 64),
        wire.HEAD.pack(0, 0, 64, 0, 0, 0, 0),
        wire.HEAD.pack(0, 0xFFFFFFFF, 64, 0, 0, 0, 0),
        wire.head(0, *runs((0, 0)), 0),
        wire.head(0, *runs((0, 64), (64, 0)), 64),
        wire.head(0, *runs((-64, 64)), 64),
        wire.head(0, *runs((OUTSIDE - 1, 2)), 2),
        wire.head(0, *runs((4 * WIDE.block_bytes - 1, 2)), 2),
        wire.head(0, *runs((0, 64), (OUTSIDE, 64)), 128),
        wire.head_of_part(0, KVSlice(0, 0, 8), LAYER_BLOCK + 1),
        wire.head_of_part(0, KVSlice(0, 0, 25), 25 * LAYER_BLOCK // 8),
        wire.head_of_part(0, KVSlice(0, 8, 8), 64),
        wire.head_of_part(0, KVSlice(0, 9, 8), 64),
        wire.head_of_part(0, KVSlice(1, 0, 8, 2), 2 * LAYER_BLOCK),
        wire.head_of_part(0, KVSlice(0, 0, 2**32 - 1, 2**32 - 1), 64),
    ],
)
async def test_a_sender_that_lies_in_a_frame_is_cut_off_and_its_landing_freed(lie):
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing, ask=True))
        assert await stranger.hear() == session.Granted(0)
        stranger.lane.write(lie + b"\xaa" * 128)
        assert await stranger.closed()
        assert [type(it) for it in owner.failures] == [PeerMisbehaved]
        assert not owner.pool.any()


@pytest.mark.parametrize(
    "lie",
    [
        session.Hello(session.VERSION, WIDE.fingerprint, b""),
        session.Open(0, "wide", Epoch(1, 1), b"", ask=False),
        session.Open(2, "wide", Epoch(1, 1), b"", ask=False),
        session.Commit(9, b"", b"", b"", b""),
        session.Commit(0, b"", b"", b"not a number", b""),
        session.Touch(9),
        session.Released(9, lost=False),
    ],
    ids=lambda it: type(it).__name__,
)
async def test_a_sender_that_says_what_it_may_not_is_cut_off_and_its_landing_freed(lie):
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        stranger.say(lie)
        assert await stranger.closed()
        assert [type(it) for it in owner.failures] == [PeerMisbehaved]


@pytest.mark.parametrize("early", [True, False])
async def test_a_sender_that_wrote_more_than_it_committed_is_cut_off(early):
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        commit = session.Commit(0, b"", b"", wire.PROOF.pack(32), b"")
        if early:
            stranger.say(commit)
        stranger.write(0, *runs((0, 64)))
        stranger.lane.write(b"\xaa" * 64)
        if not early:
            await eventually(lambda: owner.pool[63] == 0xAA, "not written")
            await asyncio.sleep(0.01)
            stranger.say(commit)
        assert await stranger.closed()
        assert [type(it) for it in owner.failures] == [PeerMisbehaved]


async def test_a_commit_waits_for_the_bytes_it_names():
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        stranger.say(session.Commit(0, b"", b"", wire.PROOF.pack(128), b""))
        stranger.write(0, *runs((0, 64)))
        stranger.lane.write(b"\xaa" * 64)
        await eventually(lambda: owner.pool[63] == 0xAA, "not written")
        await asyncio.sleep(0.02)
        assert not owner.failures
        stranger.write(0, *runs((64, 64)))
        stranger.lane.write(b"\xaa" * 64)
        assert (await stranger.hear()).outcome == "mismatch"


OTHER = 64 * b"\xaa"


@pytest.mark.parametrize(
    ("later", "outcome"),
    [
        (lambda right: [], "landed"),
        (lambda right: [wire.head(0, *runs((0, 64)), 64) + OTHER], "mismatch"),
        (lambda right: [part_of(right, KVSlice(1, 8, 9), flip=True)], "mismatch"),
        (lambda right: [part_of(right, KVSlice(0, 0, 24, 2), flip=True)], "mismatch"),
        (lambda right: [part_of(right, KVSlice(1, 8, 9))], "landed"),
    ],
    ids=["nothing", "runs", "a token", "all of it", "the same"],
)
async def test_what_is_written_over_what_was_hashed_is_caught(later, outcome):
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner, source = Owner(receiver), wide_source()
        landing = owner.landing
        right = Conversion(plan(WIDE, WIDE), source, landing)
        where = source.pool_blocks, source.blocks, source.tokens
        digest = PrefixDigest(plan(WIDE, WIDE), source.pool, *where, landing_key(landing))
        digest.add_all()
        stranger.say(opening(landing))
        frames = [part_of(right, KVSlice(0, 0, 16, 2)), part_of(right, KVSlice(0, 16, 24, 2))]
        frames += later(right)
        stranger.lane.write(b"".join(frames))
        tables = sum(wire.RUN_BYTES for it in frames if it.endswith(OTHER))
        sent = sum(map(len, frames)) - len(frames) * wire.HEAD.size - tables
        proof = wire.PROOF.pack(sent)
        sealed = seal(landing, digest.result(), b"")
        stranger.say(session.Commit(0, digest.result(), sealed, proof, b""))
        assert (await stranger.hear()).outcome == outcome


def part_of(right, part, *, flip=False):
    """A frame that is `part`; with `flip`, its last bit is wrong."""
    data = np.empty(right.size(part), np.uint8)
    right.fill(part, data.ctypes.data)
    data[-1] ^= flip
    return wire.head_of_part(0, part, data.size) + data.tobytes()


async def test_a_frame_before_its_opening_waits_for_it():
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.write(0, *runs((0, 64)))
        stranger.lane.write(b"\xaa" * 64)
        await asyncio.sleep(0.02)
        stranger.say(opening(owner.landing))
        await eventually(lambda: owner.pool[63] == 0xAA, "not written")


async def test_a_frame_that_is_never_opened_ends_the_session_in_time():
    async with TcpReceiver(WIDE, stall_seconds=1.0) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        stranger.write(0, *runs((0, 64)))
        assert await stranger.closed()


async def test_a_sender_that_falls_silent_is_lost_and_its_landing_freed():
    async with TcpReceiver(WIDE, stall_seconds=1.0) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        assert await stranger.closed()
        assert [type(it) for it in owner.failures] == [PeerLost]


async def test_runs_may_span_neighbouring_blocks_of_the_landing():
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        at = WIDE.block_bytes - 32  # from block 0 into block 1
        stranger.write(0, *runs((at, 64)))
        stranger.lane.write(b"\xaa" * 64)
        await eventually(lambda: bool((owner.pool[at : at + 64] == 0xAA).all()), "not written")
        assert owner.pool.sum() == 64 * 0xAA


async def test_a_connection_that_breaks_within_a_payload_fails_its_landings_once():
    async with TcpReceiver(WIDE) as receiver:
        owner = Owner(receiver)
        async with Stranger(receiver) as stranger:
            await stranger.greeted()
            stranger.say(opening(owner.landing))
            stranger.write(0, *runs((0, 16384)))
            stranger.lane.write(b"\xaa" * 5000)
            await eventually(lambda: owner.pool[4999] == 0xAA, "the write was not begun")
        await eventually(lambda: bool(owner.failures), "the owner was not told")
        assert [type(it) for it in owner.failures] == [PeerLost]
        assert len(receiver.landings) == 0


async def test_a_stranger_who_says_nothing_is_sent_away():
    async with TcpReceiver(WIDE, stall_seconds=0.05) as receiver, Stranger(receiver) as stranger:
        assert await stranger.closed()


async def test_one_connection_too_many_is_denied():
    async with (
        TcpReceiver(WIDE, max_connections=1) as receiver,
        Stranger(receiver) as one,
        Stranger(receiver) as other,
    ):
        await one.greeted()
        assert await other.hear() == session.Denied("too many connections")


async def test_a_receiver_on_every_address_must_say_its_name():
    with pytest.raises(ValueError, match=r"^advertise"):
        TcpReceiver(WIDE, host="0.0.0.0")
    async with TcpReceiver(WIDE, host="0.0.0.0", advertise="127.0.0.1") as receiver:
        assert receiver.endpoint.address.startswith("127.0.0.1:")


async def test_a_sender_that_is_killed_frees_its_landing():
    async with TcpReceiver(WIDE) as receiver:
        owner = Owner(receiver)
        script = f"""
            import asyncio, numpy, msgspec
            from transfer.contract import KVSlice, Source
            from transfer.layout import Landing
            from transfer.tcp import TcpSender
            landing = msgspec.json.decode({msgspec.json.encode(owner.landing)!r}, type=Landing)
            pool = numpy.ones(3 * landing.layout.block_bytes, numpy.uint8)
            async def main():
                async with TcpSender() as sender:
                    source = Source(landing.layout, pool, 3, (0, 1, 2), 24)
                    writer = await sender.open(landing, source)
                    await writer.write(KVSlice(0, 0, 24))
                    await asyncio.sleep(60)
            asyncio.run(main())
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            await eventually(lambda: owner.touches > 0, "the child wrote nothing")
            child.send_signal(signal.SIGKILL)
            await eventually(lambda: bool(owner.failures), "the owner was not told")
        finally:
            child.kill()
            child.wait()
        assert [type(it) for it in owner.failures] == [PeerLost]
