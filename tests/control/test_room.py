"""What happens to a granted ticket, and to credit, when a worker has no room after all."""

import asyncio

import msgspec
import pytest
from redis.asyncio import Redis

from gateway.admission import Admission, Ticket, open_redis
from gateway.admission.wishes import Requeue
from gateway.config import RedisSection
from gateway.errors import DeadlineExceeded
from tests.support.patience import PATIENCE_SECONDS

from .conftest import LiveServer
from .queueing import (
    MODEL,
    Turn,
    book,
    gateway,
    heard,
    in_line,
    ticket,
    two_gateways,
    until,
    workers,
)

CREDITS = f"baton:{{test}}:credits:{MODEL}"
NEVER_MS = 1 << 40


async def no_credit_comes_back(redis: Redis) -> None:
    """Once it is cut, that is: not while a test looks."""
    offer = msgspec.msgpack.decode(await redis.hget(CREDITS, "decode"))
    await redis.hset(CREDITS, "decode", msgspec.msgpack.encode({**offer, "pause": NEVER_MS}))


class Door:
    """A worker that lets `room` in at once and refuses the others."""

    def __init__(self, room: int, worker: str = "decode") -> None:
        self.room = room
        self.worker = worker
        self.running = 0
        self.refusals = 0
        self.served: list[str] = []

    async def take(self, admission: Admission, one: Ticket, seconds: float = 0.02) -> None:
        async with admission.turn(one) as grant:
            while self.running >= self.room:
                self.refusals += 1
                await grant.again(self.worker, "decode")
            self.running += 1
            await asyncio.sleep(seconds)
            self.running -= 1
            self.served.append(one.id)


async def test_a_refused_ticket_goes_back_to_its_old_place(redis: Redis) -> None:
    """Before those that came after it, and nobody else is let in where it was not."""
    async with two_gateways(redis, decode=40) as (one, two), asyncio.TaskGroup() as tasks:
        turns = [Turn(tasks, one, ticket(str(number), seconds=60 + number)) for number in range(4)]
        for turn in turns:
            await turn.inside.wait()
        late = Turn(tasks, two, ticket("late", seconds=90))
        await in_line(redis, 1, two)
        await no_credit_comes_back(redis)
        again = asyncio.ensure_future(turns[1].grant.again("decode", "decode"))
        await in_line(redis, 2)
        assert (await book(redis))["held_decode"] == 30
        await heard(two)
        assert not late.inside.is_set(), "the room that it gives back is not there"
        turns[0].leave.set()
        await asyncio.wait_for(again, PATIENCE_SECONDS)
        await heard(two)
        assert not late.inside.is_set()
        for turn in (*turns, late):
            turn.leave.set()
        await late.inside.wait()


async def test_a_full_worker_refuses_one_ticket_at_a_time_and_not_a_crowd(redis: Redis) -> None:
    """It offers far more than it has: all are served, with few refusals beyond the first rush."""
    door = Door(4)
    async with (
        workers(redis, decode=1 << 30),
        gateway(redis) as admission,
    ):
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as tasks:
            for number in range(100):
                tasks.create_task(door.take(admission, ticket(str(number))))
        assert len(door.served) == 100
        assert door.refusals < 96 + 60
        await admission.flush(PATIENCE_SECONDS)
        assert await book(redis) == {"held_prefill": 0, "held_decode": 0}


async def test_a_worker_s_credit_comes_back(redis: Redis) -> None:
    async with (
        workers(redis, decode=100),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        await asyncio.wait_for(first.grant.again("decode", "decode"), PATIENCE_SECONDS)
        others = [Turn(tasks, admission, ticket(str(number))) for number in range(9)]
        for other in others:
            await asyncio.wait_for(other.inside.wait(), PATIENCE_SECONDS)
        for turn in (first, *others):
            turn.leave.set()


@pytest.mark.parametrize("worker", ["decode", "one that is not registered"])
async def test_a_worker_that_is_always_full_is_asked_ever_more_rarely(
    redis: Redis, worker: str
) -> None:
    """Until the deadline ends it."""
    async with (
        workers(redis, decode=100),
        gateway(redis) as admission,
    ):
        door = Door(0, worker)
        with pytest.raises(DeadlineExceeded):
            await door.take(admission, ticket(seconds=3.0))
        assert 3 <= door.refusals <= 13


async def test_another_worker_s_room_is_not_taken_away(redis: Redis) -> None:
    """A worker that refuses cuts no more than it offered."""
    small = {"prefill": 0, "decode": 10, "lapses": 1 << 50, "incarnation": 1, "pause": NEVER_MS}
    await redis.hset(CREDITS, "small", msgspec.msgpack.encode(small))
    async with (
        workers(redis, decode=100),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        await asyncio.wait_for(first.grant.again("small", "decode"), PATIENCE_SECONDS)
        others = [Turn(tasks, admission, ticket(str(number))) for number in range(9)]
        for other in others:
            await asyncio.wait_for(other.inside.wait(), PATIENCE_SECONDS)
        for turn in (first, *others):
            turn.leave.set()


async def test_a_late_refusal_of_an_earlier_grant_changes_nothing(redis: Redis) -> None:
    """A retry of a message, after the ticket was granted anew, is fenced by its epoch."""
    async with (
        workers(redis, decode=100),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        turn = Turn(tasks, admission, ticket())
        await turn.inside.wait()
        (inner,) = admission._turns.values()
        old = inner.epoch
        await asyncio.wait_for(turn.grant.again("decode", "decode"), PATIENCE_SECONDS)
        assert inner.epoch > old
        new, inner.epoch = inner.epoch, old
        inner.prefill_tokens = 1
        turn.grant.prefilled()  # with the epoch of the earlier grant
        await admission.flush(PATIENCE_SECONDS)
        inner.epoch = new
        stale = Requeue(inner.name, old, "decode", "decode", 10, 1000)
        _, granted = await admission._script("requeue", MODEL, stale)
        assert granted, "it has what it was granted since"
        assert inner.epoch == new
        assert await book(redis) == {"held_prefill": 10, "held_decode": 10}
        turn.leave.set()


async def test_while_redis_is_away_a_refused_right_is_kept(mortal_server: LiveServer) -> None:
    async with (
        open_redis(RedisSection(url=mortal_server.url)) as redis,
        workers(redis, decode=100),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        turn = Turn(tasks, admission, ticket())
        await turn.inside.wait()
        mortal_server.kill()
        await until(lambda: not admission.available)
        await asyncio.wait_for(turn.grant.again("decode", "decode"), PATIENCE_SECONDS)
        await mortal_server.start()
        await until(lambda: admission.available)
        assert (await book(redis))["held_decode"] == 10
        turn.leave.set()


async def test_a_long_prompt_claims_no_more_room_than_one_worker_offers(redis: Redis) -> None:
    """It need not wait until all workers have run dry, and gives back what it has claimed."""
    async with (
        workers(redis, prefill=10, decode=1000),
        gateway(redis, "g1") as one,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, one, ticket("first", prefill=5, decode=1))
        await first.inside.wait()
        long = Turn(tasks, one, ticket("long", prefill=5000, decode=1))
        await until(lambda: one.waiting == 1)
        first.grant.prefilled()  # it is decoded on and keeps its lease
        await asyncio.wait_for(long.inside.wait(), PATIENCE_SECONDS)
        assert (await book(redis))["held_prefill"] == 10
        long.grant.prefilled()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await book(redis))["held_prefill"] != 0:
                await asyncio.sleep(0.005)
        first.leave.set()
        long.leave.set()
