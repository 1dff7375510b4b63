"""A Redis that forgets its last writes, or for which lifetimes pass, loses nobody's right."""

import asyncio
import random
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from gateway.admission import Admission, Terms, open_redis
from gateway.config import RedisSection
from gateway.leash import leashed
from gateway.redis_server import command
from tests.support.patience import PATIENCE_SECONDS

from .conftest import LiveServer, programs
from .queueing import (
    ROOM,
    Turn,
    book,
    gateway,
    heard,
    in_line,
    patient,
    published,
    ticket,
    two_gateways,
    until,
    waiting,
    workers,
)

LIMITS = patient(lease_seconds=2.0)


def log_of(server: LiveServer) -> Path:
    """The append-only file that grows; Redis 7 keeps it in a folder, in parts."""
    parts = [*server.folder.rglob("*.incr.aof"), *server.folder.glob("appendonly.aof")]
    return max(parts, key=lambda part: part.stat().st_mtime)


class Amnesia:
    """Remembers how long the log was, to cut it there while the server is dead."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._size = 0

    async def remember(self) -> None:
        await self._server.logged()
        self._size = log_of(self._server).stat().st_size

    async def forget(self, *, torn: bool = True) -> int:
        """Kill the server and lose what it wrote since; how many bytes that were.

        `torn`: the first forgotten write is there in part.
        """
        await self._server.logged()
        self._server.kill()
        log = log_of(self._server)
        lost = log.stat().st_size - self._size
        with log.open("r+b") as file:
            file.truncate(self._size + (20 if torn and lost > 20 else 0))
        return lost


@pytest.fixture(params=sorted(programs()))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LiveServer]:
    made = LiveServer(programs()[request.param], tmp_path)
    await made.start()
    yield made
    made.kill()


@asynccontextmanager
async def gateways_of(
    server: LiveServer, *, decode: int
) -> AsyncIterator[tuple[Admission, Admission]]:
    async with (
        open_redis(RedisSection(url=server.url)) as redis,
        two_gateways(redis, prefill=1000, decode=decode, limits=LIMITS) as both,
    ):
        yield both


async def test_grants_that_redis_forgot_are_still_held(server: LiveServer) -> None:
    """It thinks that they wait, or has never heard of them; nobody else gets their room."""
    amnesia = Amnesia(server)
    async with (
        gateways_of(server, decode=20) as (one, two),
        open_redis(RedisSection(url=server.url)) as redis,
        asyncio.TaskGroup() as tasks,
    ):
        first = [Turn(tasks, gate, ticket()) for gate in (one, two)]
        for turn in first:
            await turn.inside.wait()
        second = [Turn(tasks, gate, ticket()) for gate in (one, two)]
        await in_line(redis, 2, one, two)
        await amnesia.remember()
        for turn in first:
            turn.leave.set()
        for turn in second:
            await asyncio.wait_for(turn.inside.wait(), PATIENCE_SECONDS)
        late = [Turn(tasks, gate, ticket()) for gate in (one, two)]
        await in_line(redis, 2, one, two)
        assert await amnesia.forget() > 0
        await server.start()
        await until(lambda: one.available and two.available)
        await published(redis, 2)
        await until(lambda: one.held + two.held == 2)
        await in_line(redis, 2)
        # The two that ended in the forgotten second are held by nobody, and lapse by themselves,
        # if they have not yet.
        assert (await book(redis))["held_decode"] in (20, 40)
        assert not any(turn.inside.is_set() for turn in late)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await book(redis))["held_decode"] > 20:
                await asyncio.sleep(0.05)
        assert not any(turn.inside.is_set() for turn in late)
        for turn in second:
            turn.leave.set()
        for turn in late:
            await asyncio.wait_for(turn.inside.wait(), PATIENCE_SECONDS)
            turn.leave.set()
        await until(lambda: one.held + two.held == 0)
        await one.flush(PATIENCE_SECONDS)
        await two.flush(PATIENCE_SECONDS)
        assert (await book(redis))["held_decode"] == 0


async def test_whatever_is_forgotten_nobody_runs_twice_and_no_room_is_given_twice(
    server: LiveServer,
) -> None:
    """Under load, three times, cut at a random place; every request is served exactly once."""
    seed = random.randrange(1 << 32)
    chance, room = random.Random(seed), 40
    served: Counter[str] = Counter()
    running = most = 0

    async def take(admission: Admission, name: str) -> None:
        nonlocal running, most
        wish = ticket(name, terms=Terms(concurrent=1000))
        async with admission.turn(wish, generated=lambda: 3) as grant:
            running += 10
            most = max(most, running)
            await asyncio.sleep(chance.random() * 0.05)
            grant.prefilled()
            await asyncio.sleep(chance.random() * 0.05)
            running -= 10
            served[name] += 1

    async with (
        gateways_of(server, decode=room) as gates,
        open_redis(RedisSection(url=server.url)) as redis,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(300):
            tasks.create_task(take(gates[number % 2], str(number)))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await redis.hget(ROOM, "arrivals") != b"300":
                await asyncio.sleep(0.01)
        for gate in gates:
            await heard(gate)
        for _ in range(3):
            amnesia = Amnesia(server)
            await asyncio.sleep(0.1 + chance.random() * 0.2)
            await amnesia.remember()
            await asyncio.sleep(chance.random() * 0.3)
            await amnesia.forget(torn=chance.random() < 0.5)
            await server.start()
            await until(lambda: all(gate.available for gate in gates))
    assert served == Counter(map(str, range(300))), f"seed {seed}"
    assert most <= room, f"seed {seed}: more ran at once than there was room"


async def test_lifetimes_that_pass_while_redis_is_down_cost_nobody_anything(
    server: LiveServer,
) -> None:
    """Every key was gone when it came back, and gateways and workers say what there is."""
    amnesia = Amnesia(server)
    async with (
        gateways_of(server, decode=20) as (one, two),
        open_redis(RedisSection(url=server.url)) as redis,
        asyncio.TaskGroup() as tasks,
    ):
        running = [Turn(tasks, gate, ticket()) for gate in (one, two)]
        for turn in running:
            await turn.inside.wait()
        lined_up = [Turn(tasks, gate, ticket()) for gate in (one, two)]
        await in_line(redis, 2, one, two)
        for key in await redis.keys("*"):
            await redis.pexpire(key, 300)
        await amnesia.remember()
        await amnesia.forget(torn=False)
        await asyncio.sleep(0.4)
        await server.start()
        await until(lambda: one.available and two.available)
        await published(redis, 2)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await waiting(redis) != 2 or (await book(redis)).get("held_decode") != 20:
                await asyncio.sleep(0.01)
        assert not any(turn.inside.is_set() for turn in lined_up)
        for turn in running:
            turn.leave.set()
        for turn in lined_up:
            await asyncio.wait_for(turn.inside.wait(), PATIENCE_SECONDS)
            turn.leave.set()


async def test_after_a_restart_nothing_is_granted_before_all_have_said_what_they_hold(
    server: LiveServer,
) -> None:
    """One gateway cannot be reached from Redis for a while; its room is not given away."""
    limits = patient(lease_seconds=4.0)
    async with (
        open_redis(RedisSection(url=server.url)) as redis,
        workers(redis, decode=10, lease_seconds=4.0),
        gateway(redis, "g1", limits) as one,
        AsyncExitStack() as stack,
    ):
        slow = Admission(redis, "test", "slow", limits)
        running = asyncio.ensure_future(slow.run())
        await asyncio.wait_for(slow.until_available(), PATIENCE_SECONDS)
        await heard(slow)
        amnesia = Amnesia(server)
        await amnesia.remember()
        await stack.enter_async_context(slow.turn(ticket()))
        await amnesia.forget()
        running.cancel()
        await asyncio.wait([running])
        await server.start()
        await until(lambda: one.available)
        async with asyncio.timeout(PATIENCE_SECONDS), one.turn(ticket()):
            restarted, granted = await redis.hmget(ROOM, "restarted_at", "granted_at")
            assert int(granted) - int(restarted) >= 1000 * limits.lease_seconds / 2


async def test_epochs_grow_when_redis_has_forgotten_them(server: LiveServer) -> None:
    amnesia = Amnesia(server)
    async with (
        gateways_of(server, decode=10) as (one, _),
        asyncio.TaskGroup() as tasks,
    ):
        await amnesia.remember()
        turn = Turn(tasks, one, ticket())
        await turn.inside.wait()
        (before,) = (held.epoch for held in one._turns.values())
        turn.leave.set()
        await turn.task
        await one.flush(PATIENCE_SECONDS)
        await amnesia.forget()
        await server.start()
        await until(lambda: one.available)
        turn = Turn(tasks, one, ticket())
        await asyncio.wait_for(turn.inside.wait(), PATIENCE_SECONDS)
        (after,) = (held.epoch for held in one._turns.values())
        assert after > before
        turn.leave.set()


async def test_a_log_that_ends_in_the_middle_of_a_write_is_loaded(server: LiveServer) -> None:
    """As the embedded server is started."""
    async with open_redis(RedisSection(url=server.url)) as redis:
        await redis.set("kept", 1, px=60_000)
        amnesia = Amnesia(server)
        await amnesia.remember()
        await redis.set("torn", 1, px=60_000)
        assert await amnesia.forget() > 0
        server.process = subprocess.Popen(
            leashed(command(server.program, server.folder, server.socket)),
            stdout=subprocess.DEVNULL,
        )
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not server.socket.exists() or not await _answers(server):
                await asyncio.sleep(0.02)
        assert await redis.get("kept") == b"1"
        assert await redis.get("torn") is None


async def _answers(server: LiveServer) -> bool:
    async with open_redis(RedisSection(url=server.url)) as redis:
        try:
            return bool(await redis.ping())
        except Exception:
            return False
