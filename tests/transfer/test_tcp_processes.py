"""What becomes of a handoff when the process at its other end dies, stops, starves, is cut off."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tcp_far import LAYOUT, POOL_BYTES, TOKENS, landing_at, source

from transfer.contract import whole
from transfer.errors import PeerLost
from transfer.layout import Landing
from transfer.tcp import TcpReceiver, TcpSender

ROOT = Path(__file__).parents[2]
STALL_SECONDS = 2.0
PATIENCE_SECONDS = 20.0
SLACK_BYTES = 1 << 20
"""What a starved process can still get: room for messages, not for the threads of a session."""

NEWCOMERS = 8


class Far:
    """The process at the other end."""

    def __init__(self, process):
        self._process = process

    def say(self, *words):
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")

    async def hear(self):
        async with asyncio.timeout(PATIENCE_SECONDS):
            line = await self._process.stdout.readline()
        assert line, "it ended"
        return line.decode().strip()

    def signal(self, number):
        self._process.send_signal(number)

    async def expect(self):
        self.say("expect")
        while (said := await self.hear()).split()[0] in ("arrived", "failed"):
            pass
        return msgspec.msgpack.decode(bytes.fromhex(said), type=Landing)

    async def starve(self):
        self.say("starve", SLACK_BYTES)
        assert await self.hear() == "starved"


@contextlib.asynccontextmanager
async def far(role):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("tcp_far.py")),
        role,
        str(STALL_SECONDS),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        one = Far(process)
        assert await one.hear() == "ready"
        yield one
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Owner:
    """Expects landings in one pool, and remembers how they ended."""

    def __init__(self, receiver):
        self.pool = np.zeros(POOL_BYTES, np.uint8)
        self.receiver = receiver
        self.given = 0
        self.ends = asyncio.Queue()

    def expect(self):
        self.given += 1
        landing = landing_at(self.receiver.endpoint, self.given)
        self.receiver.expect(
            landing,
            self.pool,
            touched=lambda: None,
            arrived=lambda _: self.ends.put_nowait("arrived") or b"",
            failed=lambda error: self.ends.put_nowait(type(error)),
        )
        return landing, msgspec.msgpack.encode(landing).hex()

    async def end(self):
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.ends.get()

    async def quiet(self, landing, seconds):
        """The landing is quiet in time, and stays so."""
        self.receiver.withdraw(landing.id)
        async with asyncio.timeout(seconds):
            await self.receiver.quiesce(landing.id)
        self.pool[:] = 0xEE

    def is_unharmed(self):
        return bool((self.pool == 0xEE).all())


@pytest.fixture
async def owner():
    async with TcpReceiver(LAYOUT, stall_seconds=STALL_SECONDS) as receiver:
        yield Owner(receiver)


@pytest.fixture
async def near():
    async with TcpSender(stall_seconds=STALL_SECONDS) as sender:
        yield sender


async def hand_over(sender, landing):
    writer = await sender.open(landing, source())
    try:
        for part in whole(LAYOUT.layers, TOKENS):
            await writer.write(part)
        await writer.commit(b"", PATIENCE_SECONDS)
    finally:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await writer.abort()


async def finish(writer):
    for part in whole(LAYOUT.layers, TOKENS)[1:]:
        await writer.write(part)
    await writer.commit(b"", PATIENCE_SECONDS)


def arrived(owner):
    return bool((owner.pool == source().pool).all())


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.01, 0.03])
async def test_a_sender_that_is_killed_is_lost_at_once_and_quiet(owner, moment):
    async with far("send") as sender:
        landing, words = owner.expect()
        sender.say("loop", words)
        assert await sender.hear() == "round"
        await asyncio.sleep(moment)
        sender.signal(signal.SIGKILL)
        assert await owner.end() is PeerLost
        await owner.quiet(landing, 2.0)
    await asyncio.sleep(0.1)
    assert owner.is_unharmed()
    assert owner.ends.empty()


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.01, 0.03])
async def test_what_a_stopped_sender_still_has_to_say_reaches_no_later_owner(owner, moment):
    async with far("send") as sender:
        landing, words = owner.expect()
        sender.say("loop", words)
        assert await sender.hear() == "round"
        await asyncio.sleep(moment)
        sender.signal(signal.SIGSTOP)
        await owner.quiet(landing, 1.0)
        sender.signal(signal.SIGCONT)
        while (said := await sender.hear()) == "round":
            pass
        assert said in ("LandingGone", "PeerLost")
        assert owner.is_unharmed()
        assert owner.ends.empty()
        again, words = owner.expect()
        sender.say("hand", words)
        assert await sender.hear() == "landed"
        assert arrived(owner)
        assert again.id != landing.id


async def test_a_sender_that_stays_stopped_is_lost_when_it_was_silent_too_long(owner):
    async with far("send") as sender:
        _, words = owner.expect()
        sender.say("half", words)
        assert await sender.hear() == "half"
        sender.signal(signal.SIGSTOP)
        assert await owner.end() is PeerLost


@pytest.mark.parametrize("number", [0, 1], ids=["session", "data"])
async def test_a_connection_that_is_cut_fails_the_handoff_at_both_ends(owner, number):
    async with far("send") as sender:
        _, words = owner.expect()
        sender.say("half", words)
        assert await sender.hear() == "half"
        sender.say("cut", number)
        assert await owner.end() is PeerLost
        sender.say("rest")
        assert await sender.hear() == "PeerLost"
        _, words = owner.expect()
        sender.say("hand", words)
        assert await sender.hear() == "landed"
        assert arrived(owner)


async def test_a_receiver_that_is_killed_is_lost_at_once_and_others_are_served(owner, near):
    async with far("receive") as receiver:
        writer = await near.open(await receiver.expect(), source())
        await writer.write(whole(LAYOUT.layers, TOKENS)[0])
        receiver.signal(signal.SIGKILL)
        async with asyncio.timeout(2.0):
            with pytest.raises(PeerLost):
                await writer.commit(b"", PATIENCE_SECONDS)
            await writer.abort()
    landing, _ = owner.expect()
    await hand_over(near, landing)
    assert arrived(owner)


async def test_a_receiver_that_is_stopped_is_lost_in_time_and_hears_of_it_later(near):
    async with far("receive") as receiver:
        landing = await receiver.expect()
        writer = await near.open(landing, source())
        await writer.write(whole(LAYOUT.layers, TOKENS)[0])
        receiver.signal(signal.SIGSTOP)
        async with asyncio.timeout(5 * STALL_SECONDS):
            with pytest.raises(PeerLost):
                await finish(writer)
            await writer.abort()
        receiver.signal(signal.SIGCONT)
        assert await receiver.hear() == "failed PeerLost"
        await hand_over(near, await receiver.expect())
        assert await receiver.hear() == "arrived"


async def test_a_sender_without_memory_fails_its_handoff_and_no_later_one(owner):
    async with far("send") as sender:
        _, words = owner.expect()
        await sender.starve()
        sender.say("hand", words)
        assert await sender.hear() in ("MemoryError", "PeerLost", "RuntimeError")
        sender.say("feed")
        _, words = owner.expect()
        sender.say("hand", words)
        assert await sender.hear() == "landed"
        assert arrived(owner)


async def test_a_receiver_without_memory_loses_newcomers_and_serves_whom_it_knows(near):
    async with contextlib.AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(far("receive"))
        known = await receiver.expect()
        writer = await near.open(known, source())
        await writer.write(whole(LAYOUT.layers, TOKENS)[0])
        newcomers = [
            (await stack.enter_async_context(TcpSender(stall_seconds=STALL_SECONDS)), landing)
            for landing in [await receiver.expect() for _ in range(NEWCOMERS)]
        ]
        await receiver.starve()
        async with asyncio.timeout(PATIENCE_SECONDS):
            ends = await asyncio.gather(
                *(hand_over(*newcomer) for newcomer in newcomers), return_exceptions=True
            )
            await finish(writer)
        assert PeerLost in {type(end) for end in ends} <= {PeerLost, type(None)}
        receiver.say("feed")
        sender, _ = newcomers[0]
        await hand_over(sender, await receiver.expect())
