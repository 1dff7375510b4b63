"""The session by itself: acknowledged withdrawals, permission to write, descriptors."""

import asyncio
import contextlib
import os
import socket
import tempfile
from functools import partial
from pathlib import Path

import msgspec
import pytest
from direct import DirectReceiver, DirectSender

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import KVSlice
from transfer.errors import LandingGone, PeerLost, PeerMisbehaved
from transfer.layout import Shard
from transfer.session import wire
from transfer.stage import SOURCE, TARGET, TOKENS, Gate, Pair, Stage, damaged_notes, eventually
from transfer.testing import PROMISES


@contextlib.asynccontextmanager
async def direct(layout):
    with tempfile.TemporaryDirectory() as folder:
        async with (
            DirectReceiver(layout, Path(folder), secret="s") as receiver,
            DirectSender(secret="s", stall_seconds=5.0) as sender,
        ):
            gate = sender.tamper = Gate()
            yield Pair(sender, receiver, gate.closed, None, partial(damaged_notes, sender))


@pytest.fixture
async def pair():
    async with direct(TARGET) as pair:
        yield pair


# It cannot refuse a write that it does not see: such a transport trusts its peers with the pool.
TRUSTS = {"write_outside_the_landing_is_refused"}


@pytest.mark.parametrize(
    "promise", [it for it in PROMISES if it.__name__ not in TRUSTS], ids=lambda it: it.__name__
)
async def test_a_transport_with_nothing_but_acknowledgements_keeps_the_promises(promise):
    await promise(direct)


async def test_a_receiver_refuses_kv_of_other_weights_unless_it_allows_them(pair):
    rough = msgspec.structs.replace(SOURCE, weights="q4")
    async with DirectSender(secret="s", allow_unlike_weights=True) as sender:
        with pytest.raises(PeerLost, match="refused us: weights: the source has 'q4'"):
            await sender.connect(pair.receiver.endpoint, rough, TARGET)
        await sender.connect(pair.receiver.endpoint, SOURCE, TARGET)
        pair.receiver.allow_unlike_weights = True
        await sender.connect(pair.receiver.endpoint, rough, TARGET)


async def stalled(pair, gate):
    """A handoff whose sender is held up within a write."""
    stage = Stage(pair)
    writer = await pair.sender.open(stage.landing, stage.source)
    await writer.write(KVSlice(0, 0, TOKENS))
    await eventually(lambda: gate.waiting, "nothing was written")
    return stage, writer


async def test_quiesce_waits_for_the_acknowledgement_of_a_stalled_sender(pair):
    with pair.stall() as gate:
        stage, writer = await stalled(pair, gate)
        pair.receiver.withdraw(stage.landing.id)
        quiet = asyncio.ensure_future(pair.receiver.quiesce(stage.landing.id))
        await asyncio.wait([quiet], timeout=0.1)
        assert not quiet.done()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await quiet
    with pytest.raises(LandingGone):
        await writer.commit(b"", PATIENCE_SECONDS)
    await writer.abort()


async def test_a_closed_connection_alone_proves_nothing(pair):
    intake = pair.receiver.intake
    with pair.stall() as gate:
        stage, writer = await stalled(pair, gate)
        [session] = pair.receiver._sessions.values()
        session.end(PeerLost("cut"))
        assert [type(it) for it in stage.failures] == [PeerLost]
        pair.receiver.withdraw(stage.landing.id)
        quiet = asyncio.ensure_future(pair.receiver.quiesce(stage.landing.id))
        await asyncio.wait([quiet], timeout=0.1)
        assert not quiet.done()
        intake.prove()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await quiet
    await writer.abort()


async def test_nothing_is_written_before_the_receiver_knows_the_writer(pair):
    stage = Stage(pair)
    writer = await pair.sender.open(stage.landing, stage.source)
    pair.receiver.withdraw(stage.landing.id)  # before it could hear of a writer
    async with asyncio.timeout(PATIENCE_SECONDS):
        await pair.receiver.quiesce(stage.landing.id)
    stage.pool[:] = 0xEE
    with pytest.raises(LandingGone):
        await writer.write(KVSlice(0, 0, TOKENS))
    await writer.abort()
    assert (stage.pool == 0xEE).all()


async def test_a_move_that_fails_as_it_never_should_ends_its_session_and_holds_no_blocks(pair):
    stage = Stage(pair)
    writer = await pair.sender.open(stage.landing, stage.source)
    await writer.write(KVSlice(0, 0, TOKENS))

    def broken():
        raise ZeroDivisionError("a bug")

    writer._move.settle = broken
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(PeerLost, match="a bug"):
            await writer.commit(b"", PATIENCE_SECONDS)
        await writer.abort()
        pair.receiver.withdraw(stage.landing.id)
        await pair.receiver.quiesce(stage.landing.id)
    await eventually(lambda: stage.failures, "the owner was not told")


async def test_nothing_is_measured_over_a_session_that_was_lost_meanwhile(pair):
    await pair.sender.connect(pair.receiver.endpoint, SOURCE, TARGET)
    [session] = pair.sender._sessions.values()
    session.lose(PeerLost("just now"))
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(PeerLost, match="just now"):
            await session.bytes_per_second()


async def test_descriptors_that_nobody_asked_for_are_closed(pair):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    hello = wire.frame(wire.Hello(wire.VERSION, TARGET.fingerprint, b"n"))
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(pair.receiver.endpoint.address)
        socket.send_fds(stranger, [hello], [0] * 20)
        stranger.sendall(wire.frame(wire.Proof(b"wrong", b"")))
        stranger.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await loop.sock_recv(stranger, 4096):
                pass
    await eventually(lambda: opened() <= before, "descriptors stayed open")


async def test_a_landing_for_other_heads_of_the_same_blocks_is_not_written_to(pair):
    """The other heads may have arrived, through a landing of their own."""
    stage = Stage(pair)
    foreign = msgspec.structs.replace(stage.landing, heads=Shard(1, 1))
    with pytest.raises(LandingGone):
        await stage.hand_over(foreign)
    assert (stage.pool == stage.before).all()


@pytest.mark.parametrize("outcome", ["landed", "mismatch"])
async def test_an_answer_to_a_commit_that_was_not_sent_ends_the_writing(pair, outcome):
    """The source is let go of then: nothing may read it any more."""
    stage = Stage(pair)
    writer = await pair.sender.open(stage.landing, stage.source)
    await writer.write(KVSlice(0, 0, TOKENS))
    writer.answered(wire.Answer(0, outcome))
    with pytest.raises(PeerMisbehaved):
        await writer.write(KVSlice(1, 0, TOKENS))
    with pytest.raises(PeerMisbehaved):
        await writer.commit(b"", PATIENCE_SECONDS)
    await writer.abort()


async def test_answers_that_come_again_are_not_taken_for_those_of_another_handoff(pair):
    first, second = Stage(pair, 1), Stage(pair, 2)
    await first.hand_over()
    writer = await pair.sender.open(second.landing, second.source)
    await second.write_all(writer)
    [session] = pair.receiver._sessions.values()

    def say_again():
        for ticket in (0, 99):
            for outcome in ("landed", "gone", "mismatch"):
                session._say(wire.Answer(ticket, outcome, answer=b"of another"))
                session._say(wire.Granted(ticket))

    say_again()
    committing = asyncio.ensure_future(writer.commit(b"note", PATIENCE_SECONDS))
    await asyncio.sleep(0)
    say_again()
    assert (await committing).answer == b"taken: note"
    session._say(wire.Answer(1, "gone"))
    await writer.abort()
    await Stage(pair, 3).hand_over()


async def test_an_abort_waits_for_the_write_that_is_under_way(pair):
    with pair.stall() as gate:
        _, writer = await stalled(pair, gate)
        aborting = asyncio.ensure_future(writer.abort())
        await asyncio.wait([aborting], timeout=0.1)
        assert not aborting.done()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await aborting


@pytest.mark.parametrize(
    ("ours", "theirs"), [(20.0, 1.0), (1.0, 20.0)], ids=["patient sender", "patient receiver"]
)
async def test_each_end_is_heard_from_as_often_as_it_wants_to_be(tmp_path, ours, theirs):
    async with (
        DirectReceiver(TARGET, tmp_path, stall_seconds=theirs) as receiver,
        DirectSender(stall_seconds=ours) as sender,
    ):
        stage = Stage(Pair(sender, receiver))
        writer = await sender.open(stage.landing, stage.source)
        await asyncio.sleep(3 * min(ours, theirs))  # nobody has anything to say
        await stage.write_all(writer)
        await writer.commit(b"", PATIENCE_SECONDS)
        await writer.abort()
        assert not stage.failures


@pytest.mark.parametrize("patience", [0.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_a_patience_that_would_keep_us_busy_or_silent_is_refused(patience):
    for message in (wire.Hello(wire.VERSION, "f", b"n", patience), wire.Challenge(b"n", patience)):
        with pytest.raises(PeerMisbehaved):
            wire.greeting(wire.frame(message)[wire.PREFIX.size :])


async def test_a_sender_that_closes_acknowledges_first(pair):
    with pair.stall() as gate:
        stage, _ = await stalled(pair, gate)
        closing = asyncio.ensure_future(pair.sender.close())
        await asyncio.wait([closing], timeout=0.1)
        assert not closing.done()
        assert not stage.failures
    await closing
    pair.receiver.withdraw(stage.landing.id)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await pair.receiver.quiesce(stage.landing.id)
    assert not pair.receiver.intake.kept
