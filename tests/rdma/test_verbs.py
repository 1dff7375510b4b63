"""NIXL over RDMA verbs (Soft-RoCE): the promises of a transport, and what a network can do.

The sender is at rxe0, the receiver at rxe1, and what they write crosses the wire between. The
session is not part of the wire: only what RDMA carries is lost with it.
"""

import asyncio
import contextlib
import signal
import time
from functools import partial

import pytest
from far_handoff import BLOCKS, LAYOUT, source
from nixl_desk import Owner, far, write_until_it_fails, writing_to, written_to

from transfer.errors import PeerLost
from transfer.nixl import NixlReceiver, NixlSender
from transfer.stage import Gate, Pair, damaged_notes
from transfer.testing import PROMISES
from transfer.testing.arriving import a_handoff_arrives_bit_for_bit, many_handoffs_share_a_pair
from transfer.testing.endings import no_write_lands_after_quiesce

# Nothing but verbs, so that nothing else can be used in silence. The limits are short of what a
# gap of some seconds needs: here a write must fail soon.
VERBS = {
    "UCX_TLS": "rc_verbs,ud_verbs",
    "UCX_RC_VERBS_TIMEOUT": "200ms",
    "UCX_RC_VERBS_RETRY_COUNT": "5",
}
HERE = {**VERBS, "UCX_NET_DEVICES": "rxe0:1"}
THERE = {**VERBS, "UCX_NET_DEVICES": "rxe1:1"}
PATIENT = {"UCX_RC_VERBS_TIMEOUT": "1s", "UCX_RC_VERBS_RETRY_COUNT": "6"}
STALL_SECONDS = 15.0
PAYLOAD_BYTES = BLOCKS * LAYOUT.block_bytes
MTU_BYTES = 4096


@pytest.fixture
def at(monkeypatch):
    """Call with the settings of the end that is played here."""

    def settle(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return settle


STAGED = (a_handoff_arrives_bit_for_bit, many_handoffs_share_a_pair, no_write_lands_after_quiesce)


@pytest.mark.parametrize(
    ("promise", "direct_bytes"),
    [*((it, 1) for it in PROMISES), *((it, 1 << 20) for it in STAGED)],
    ids=lambda it: getattr(it, "__name__", it),
)
async def test_verbs_keep_every_promise(promise, direct_bytes, at, wire):
    @contextlib.asynccontextmanager
    async def pair(layout):
        at(THERE)
        async with NixlReceiver(layout, stall_seconds=STALL_SECONDS) as receiver:
            at(HERE)
            async with NixlSender(
                stall_seconds=STALL_SECONDS, connect_seconds=30, direct_bytes=direct_bytes
            ) as sender:
                gate = sender.tamper = Gate()
                yield Pair(sender, receiver, gate.closed, None, partial(damaged_notes, sender))

    await promise(pair)


async def hand_over(at, limits=None):
    """From another process into a pool here. What arrived is the source."""
    limits = limits or {}
    at(THERE | limits)
    async with NixlReceiver(LAYOUT, stall_seconds=STALL_SECONDS) as receiver:
        owner = Owner(receiver)
        async with far("send", stall_seconds=STALL_SECONDS, **HERE | limits) as sender:
            sender.tell("commit", owner.expect())
            assert await sender.hear() == ["written"]
            assert await sender.hear() == ["landed"]
    assert (owner.pool == source().pool).all()


async def told(owner):
    async with asyncio.timeout(60):
        while not owner.failures:
            await asyncio.sleep(0.05)


async def test_a_handoff_crosses_the_wire_as_rdma_packets(at, wire):
    packets, sent = wire.packets(), wire.sent_bytes()
    await hand_over(at)
    assert wire.packets() - packets >= PAYLOAD_BYTES // MTU_BYTES
    assert wire.sent_bytes() - sent >= PAYLOAD_BYTES


async def test_a_wire_that_loses_two_percent_delivers_all_the_same(at, wire):
    wire.set("loss", "2")
    await hand_over(at, PATIENT)


async def test_a_receiver_that_is_killed_is_noticed_soon(at, wire):
    at(HERE)
    async with writing_to(STALL_SECONDS, **THERE) as (receiver, writer):
        receiver.signal(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(PeerLost):
            await write_until_it_fails(writer)
        # Emulated, and busy with retries; what counts is that it is not UCX's own time limit.
        assert time.monotonic() - begun < 2.0
        await writer.abort()


async def test_a_sender_that_is_killed_is_quiet_soon(at, wire):
    at(THERE)
    async with written_to(stall_seconds=STALL_SECONDS, **HERE) as (owner, sender):
        sender.signal(signal.SIGKILL)
        await told(owner)
        await owner.quiet(5.0)
        assert await owner.stays_as_it_is(1.0)


async def test_a_stopped_sender_is_quiet_once_the_agent_was_made_anew_and_can_come_back(at, wire):
    """That a new agent cuts off what was posted to the old one, `test_nixl.py` shows over TCP.

    Over Soft-RoCE nothing of it has landed even without one.
    """
    at(THERE)
    for_ever = {"UCX_RC_VERBS_RETRY_COUNT": "7"}
    async with written_to("foreign", stall_seconds=8.0, **HERE | for_ever) as (owner, sender):
        wire.set("blackhole")
        lost_from = wire.packets()
        async with asyncio.timeout(60):  # so that something is under way when the agent ends
            while wire.packets() < lost_from + 20:
                await asyncio.sleep(0.05)
        sender.signal(signal.SIGSTOP)
        await told(owner)
        await owner.quiet(30.0)
        owner.pool[:] = 0xEE
        wire.set("reset")
        assert await owner.stays_as_it_is(5.0)
        sender.signal(signal.SIGCONT)
        assert await sender.hear() == ["failed", "PeerLost"]
        assert await sender.hear() == ["aborted"]
        sender.tell("commit", owner.expect())
        assert await sender.hear() == ["written"]
        assert await sender.hear() == ["landed"]


async def test_a_partition_fails_the_handoff_and_leaves_no_late_write(at, wire):
    at(THERE)
    async with written_to("foreign", stall_seconds=STALL_SECONDS, **HERE) as (owner, sender):
        wire.set("blackhole")
        await told(owner)
        assert await sender.hear() == ["failed", "PeerLost"]
        await owner.quiet(30.0)
        owner.pool[:] = 0xEE
        wire.set("reset")
        assert await owner.stays_as_it_is(2.0)
        assert await sender.hear() == ["aborted"]
        sender.tell("commit", owner.expect())
        assert await sender.hear() == ["written"]
        assert await sender.hear() == ["landed"]
