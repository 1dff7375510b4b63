"""What NIXL has to bear beyond what every transport promises: peers that stop, or are no more."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from functools import partial

import msgspec
import numpy as np
import pytest

pytest.importorskip("nixl_cu12")

from far_handoff import source
from nixl_desk import SOON_SECONDS, write_until_it_fails, writing_to, written_to

from tests.support.patience import PATIENCE_SECONDS
from transfer.errors import LandingGone, PeerLost
from transfer.nixl import NixlReceiver, NixlSender, wire
from transfer.nixl.agent import Agent
from transfer.nixl.mover import Way
from transfer.pool import Pool
from transfer.shared_memory import allocate
from transfer.stage import (
    SOURCE,
    TARGET,
    TARGET_BLOCKS,
    Gate,
    Pair,
    Stage,
    damaged_notes,
    eventually,
)
from transfer.testing import PROMISES


@pytest.fixture(params=["tcp", "all"])
def network(request, monkeypatch):
    """What UCX may use: TCP alone, or shared memory as well."""
    monkeypatch.setenv("UCX_TLS", request.param)
    return request.param


# ---- the promises ----------------------------------------------------------------------------


@pytest.mark.parametrize("promise", PROMISES, ids=lambda it: it.__name__)
@pytest.mark.parametrize("direct_bytes", [1, 1 << 20], ids=["direct", "staged"])
async def test_nixl_keeps_every_promise(promise, direct_bytes, network):
    @contextlib.asynccontextmanager
    async def pair(layout):
        async with (
            NixlReceiver(layout, secret="between workers") as receiver,
            NixlSender(secret="between workers", direct_bytes=direct_bytes) as sender,
        ):
            gate = sender.tamper = Gate()
            yield Pair(sender, receiver, gate.closed, None, partial(damaged_notes, sender))
        assert len(asyncio.all_tasks()) == 1

    await promise(pair)


# ---- the other end is lost -------------------------------------------------------------------


async def test_a_killed_receiver_is_noticed_soon(network):
    async with writing_to() as (receiver, writer):
        receiver.signal(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(PeerLost):
            await write_until_it_fails(writer)
        await writer.abort()
        assert time.monotonic() - begun < SOON_SECONDS


async def test_a_stopped_receiver_is_noticed_soon_and_hears_of_it_later(network):
    async with writing_to() as (receiver, writer):
        receiver.signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(PeerLost):
            await write_until_it_fails(writer)
        assert time.monotonic() - begun < SOON_SECONDS
        receiver.signal(signal.SIGCONT)
        assert await receiver.hear() == ["failed", "PeerLost"]
        await writer.abort()


async def test_a_killed_sender_is_quiet_soon(network):
    async with written_to() as (owner, sender):
        sender.signal(signal.SIGKILL)
        begun = time.monotonic()
        await eventually(lambda: bool(owner.failures), "the owner was not told")
        assert time.monotonic() - begun < SOON_SECONDS
        await owner.quiet()
        assert await owner.stays_as_it_is()


async def test_a_stopped_sender_is_lost_soon_but_not_quiet_until_it_is_dead(network):
    async with written_to() as (owner, sender):
        sender.signal(signal.SIGSTOP)
        begun = time.monotonic()
        await eventually(lambda: bool(owner.failures), "the owner was not told")
        assert time.monotonic() - begun < SOON_SECONDS
        with pytest.raises(TimeoutError):
            await owner.quiet(1.0)
        sender.signal(signal.SIGKILL)
        await owner.quiet()
        assert await owner.stays_as_it_is()


async def test_a_sender_that_comes_back_says_that_it_has_stopped(network):
    async with written_to() as (owner, sender):
        sender.signal(signal.SIGSTOP)
        await eventually(lambda: bool(owner.failures), "the owner was not told")
        first = owner.landing
        sender.signal(signal.SIGCONT)
        assert await sender.hear() == ["failed", "PeerLost"]
        assert await sender.hear() == ["aborted"]
        sender.tell("commit", owner.expect())
        assert await sender.hear() == ["written"]
        assert await sender.hear() == ["landed"]
        assert (owner.pool == source().pool).all()
        owner.landing = first
        await owner.quiet()


async def test_a_sender_on_another_machine_is_cut_off_by_making_the_agent_anew(network):
    async with written_to("foreign") as (owner, sender):
        sender.signal(signal.SIGSTOP)
        await eventually(lambda: bool(owner.failures), "the owner was not told")
        await owner.quiet()
        if network == "tcp":  # with shared memory such a sender would not be on another machine
            owner.pool[:] = 0xEE
            sender.signal(signal.SIGCONT)
            assert await sender.hear() == ["failed", "PeerLost"]
            assert await owner.stays_as_it_is()
        else:
            sender.signal(signal.SIGCONT)
            assert await sender.hear() == ["failed", "PeerLost"]
        assert await sender.hear() == ["aborted"]
        sender.tell("commit", owner.expect())
        assert await sender.hear() == ["written"]
        assert await sender.hear() == ["landed"]


async def test_a_withdrawn_landing_is_quiet_once_its_writer_has_stopped(network):
    async with written_to() as (owner, sender):
        await owner.quiet()
        assert await owner.stays_as_it_is()
        assert await sender.hear() == ["failed", LandingGone.__name__]


# ---- the agent -------------------------------------------------------------------------------


class Bench:
    """A way to an agent that looks at nothing by itself, so that what is written there waits."""

    def __init__(self):
        self.here, self.there = Agent(), Agent()
        self.there.end()
        self.arena = allocate(wire.WINDOW_BYTES)
        self.there.register(self.arena)
        self.scratch = allocate(wire.WINDOW_BYTES)
        self.scratch[:] = 7
        self.here.register(self.scratch)
        terms = wire.Terms(self.there.metadata()[1], self.arena.ctypes.data)
        self.sockets = socket.socketpair(), socket.socketpair()
        self.sockets[0][1].settimeout(PATIENCE_SECONDS)
        session, desk = (it[0] for it in self.sockets)
        self.way = Way(self.here, session, desk, terms, self.scratch)

    def write(self):
        there = wire.There(b"mark", (0,), (self.arena.ctypes.data,))
        one = np.ones(1, np.int64)
        self.way.send(5, one * self.scratch.ctypes.data, 0 * one, one * self.arena.nbytes, there)

    def look(self, seconds, until=lambda: False):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            self.there._look()
            time.sleep(0.001)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    return Bench()


def test_a_release_waits_for_writes_that_nobody_can_call_off(bench):
    bench.write()
    release = threading.Thread(target=bench.way.quiet, args=(5,), daemon=True)
    release.start()
    bench.way.cut()
    release.join(0.5)
    assert release.is_alive()
    assert not bench.way.settled
    bench.look(PATIENCE_SECONDS, lambda: not release.is_alive())
    release.join(PATIENCE_SECONDS)
    assert (bench.arena == 7).all()
    assert bench.way.settled


def test_no_write_lands_once_the_agent_was_made_anew(bench):
    bench.write()
    bench.there.renew()
    release = threading.Thread(target=bench.way.quiet, args=(5,), daemon=True)
    release.start()
    bench.look(0.5)
    assert not bench.arena.any()
    release.join(PATIENCE_SECONDS)
    assert not release.is_alive()
    assert not bench.way.settled
    assert bench.sockets[0][1].recv(1) == b"", "the session would say that all is well"


async def test_a_sender_vouches_only_for_sessions_that_have_ended():
    async with NixlReceiver(TARGET) as receiver, NixlSender() as sender:
        carrier = sender._carrier

        async def settled():
            hello = await asyncio.to_thread(carrier.hello, receiver.endpoint)
            return msgspec.msgpack.decode(hello, type=wire.Greeting).settled

        assert await settled()
        await sender.connect(receiver.endpoint, SOURCE, TARGET)
        assert not await settled()
        await receiver.close()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await settled():
                await asyncio.sleep(0.01)


async def test_after_a_handoff_nobody_looks_often_any_more():
    async with NixlReceiver(TARGET) as receiver, NixlSender() as sender:
        stage = Stage(Pair(sender, receiver))
        await stage.hand_over()
        visitors = receiver.intake.agent._visitors
        await eventually(lambda: not visitors, f"{visitors} are still looked after")


async def test_a_pool_that_is_given_at_the_start_is_registered_then():
    memory = allocate(TARGET_BLOCKS * TARGET.block_bytes)
    pool = Pool.of(TARGET, TARGET_BLOCKS, memory)
    async with NixlReceiver(TARGET, pool=pool) as receiver:
        assert (memory.ctypes.data, memory.nbytes) in receiver.intake.agent._memory


async def test_an_agent_with_nothing_to_do_costs_nothing():
    agent = await asyncio.to_thread(Agent)
    before = time.process_time()
    await asyncio.sleep(1.0)
    assert time.process_time() - before < 0.05
    agent.close()


def test_a_process_that_used_an_agent_ends_well_and_its_thread_before():
    script = """
import atexit, os, threading
names = lambda: [it.name for it in threading.enumerate()]
atexit.register(lambda: "kv-nixl" in names() and os._exit(9))
from transfer.nixl.agent import Agent
agent = Agent()
agent.expect(agent)
assert "kv-nixl" in names()
"""
    done = os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", script], os.environ)
    assert done == 0
