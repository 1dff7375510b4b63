"""The shared queue, against real Redis servers."""

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from gateway.admission import Admission, open_redis
from gateway.config import RedisSection
from gateway.errors import DeadlineExceeded, NoWorkers, QueueFull, QueueUnavailable
from tests.support.patience import PATIENCE_SECONDS

from .conftest import LiveServer
from .queueing import (
    LIMITS,
    MODEL,
    ROOM,
    Turn,
    book,
    gateway,
    in_line,
    patient,
    published,
    ticket,
    two_gateways,
    until,
    waiting,
    workers,
)


async def test_a_request_is_granted_at_once_when_there_is_room(redis: Redis) -> None:
    async with workers(redis), gateway(redis) as admission:
        async with admission.turn(ticket()):
            assert (await book(redis))["held_prefill"] == 10
        await admission.flush(PATIENCE_SECONDS)
        assert (await book(redis))["held_prefill"] == 0
        assert await redis.exists("baton:{test}:tickets:" + MODEL) == 0


async def test_turns_are_taken_in_order_of_priority_then_arrival(redis: Redis) -> None:
    async with workers(redis, decode=10), gateway(redis) as admission, asyncio.TaskGroup() as tasks:
        order: list[str] = []
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()

        async def take(name: str, priority: int) -> None:
            async with admission.turn(ticket(name, priority=priority)):
                order.append(name)

        for count, (name, priority) in enumerate([("a", 0), ("b", 0), ("low", -1), ("high", 1)]):
            tasks.create_task(take(name, priority))
            await in_line(redis, count + 1)
        assert order == []
        first.leave.set()
        await until(lambda: len(order) == 4)
        assert order == ["high", "a", "b", "low"]


async def test_a_request_larger_than_all_budgets_runs_alone(redis: Redis) -> None:
    async with workers(redis), gateway(redis) as admission, asyncio.TaskGroup() as tasks:
        small = Turn(tasks, admission, ticket("small"))
        await small.inside.wait()
        huge = Turn(tasks, admission, ticket("huge", prefill=1000, decode=1000))
        late = Turn(tasks, admission, ticket("late"))
        await asyncio.sleep(0.1)
        assert not huge.inside.is_set()
        assert not late.inside.is_set(), "the later one must not overtake"
        small.leave.set()
        await asyncio.wait_for(huge.inside.wait(), PATIENCE_SECONDS)
        assert not late.inside.is_set()
        huge.leave.set()
        await asyncio.wait_for(late.inside.wait(), PATIENCE_SECONDS)
        late.leave.set()


async def test_a_finished_prefill_makes_room_for_the_next_one(redis: Redis) -> None:
    async with (
        workers(redis, prefill=10),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        second = Turn(tasks, admission, ticket("second"))
        await first.inside.wait()
        await asyncio.sleep(0.05)
        assert not second.inside.is_set()
        first.grant.prefilled()
        first.grant.prefilled()
        await asyncio.wait_for(second.inside.wait(), PATIENCE_SECONDS)
        assert (await book(redis))["held_decode"] == 20
        first.leave.set()
        second.leave.set()
        await until(lambda: admission.held == 0)
        await admission.flush(PATIENCE_SECONDS)
        assert (await book(redis))["held_prefill"] == 0


async def test_grants_reach_the_gateway_that_owns_the_connection(redis: Redis) -> None:
    async with two_gateways(redis, decode=10) as (one, two), asyncio.TaskGroup() as tasks:
        first = Turn(tasks, one, ticket())
        await first.inside.wait()
        second = Turn(tasks, two, ticket())
        await in_line(redis, 1, two)
        assert not second.inside.is_set()
        first.leave.set()
        await asyncio.wait_for(second.inside.wait(), PATIENCE_SECONDS)
        second.leave.set()


async def test_two_gateways_never_hold_more_than_there_is(redis: Redis) -> None:
    held = most = 0
    full = asyncio.Event()

    async def take(admission: Admission, number: int) -> None:
        nonlocal held, most
        async with admission.turn(ticket(str(number))):
            held += 10
            most = max(most, held)
            if held == 40:
                full.set()
            await full.wait()
            await asyncio.sleep(0.001)
            held -= 10

    async with workers(redis, decode=40), gateway(redis, "g1") as one, gateway(redis, "g2") as two:
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as tasks:
            for number in range(60):
                tasks.create_task(take(one if number % 2 else two, number))
        assert most == 40
        await one.flush(PATIENCE_SECONDS)
        await two.flush(PATIENCE_SECONDS)
        assert (await book(redis))["held_decode"] == 0


async def test_a_full_queue_refuses_at_once(redis: Redis) -> None:
    async with (
        workers(redis, decode=10),
        gateway(redis, limits=patient(max_waiting=1)) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        second = Turn(tasks, admission, ticket("second"))
        await until(lambda: admission.waiting == 1)
        with pytest.raises(QueueFull):
            async with admission.turn(ticket("third")):
                pass
        first.leave.set()
        second.leave.set()


async def test_a_cancelled_wait_leaves_the_queue(redis: Redis) -> None:
    async with workers(redis, decode=10), gateway(redis) as admission, asyncio.TaskGroup() as tasks:
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        second = Turn(tasks, admission, ticket("second"))
        third = Turn(tasks, admission, ticket("third"))
        await in_line(redis, 2)
        second.task.cancel()
        await in_line(redis, 1)
        first.leave.set()
        await asyncio.wait_for(third.inside.wait(), PATIENCE_SECONDS)
        third.leave.set()


async def test_a_cancel_while_the_question_travels_leaves_nothing(redis: Redis) -> None:
    async with workers(redis), gateway(redis) as admission, asyncio.TaskGroup() as tasks:
        turns = []
        for yields in range(6):
            turns.append(Turn(tasks, admission, ticket()))
            for _ in range(yields):
                await asyncio.sleep(0)
            turns[-1].task.cancel()
        await asyncio.wait([turn.task for turn in turns])
        await admission.flush(PATIENCE_SECONDS)
        assert await redis.exists("baton:{test}:tickets:" + MODEL) == 0
        assert (await book(redis)).get("held_decode", 0) == 0


async def test_a_deadline_ends_the_wait(redis: Redis) -> None:
    async with workers(redis, decode=10), gateway(redis) as admission, asyncio.TaskGroup() as tasks:
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        with pytest.raises(DeadlineExceeded, match="queued"):
            async with admission.turn(ticket("second", seconds=0.2)):
                pass
        await admission.flush(PATIENCE_SECONDS)
        assert await waiting(redis) == 0
        first.leave.set()


async def test_without_workers_a_request_waits_and_then_says_so(redis: Redis) -> None:
    async with gateway(redis, limits=patient(worker_wait_seconds=1.0)) as admission:
        with pytest.raises(NoWorkers):
            async with admission.turn(ticket()):
                pass
        with pytest.raises(NoWorkers):
            async with admission.turn(ticket(seconds=0.5)):
                pass


async def test_workers_that_went_just_now_are_waited_for_as_long_as_others(redis: Redis) -> None:
    """However long somebody has stood in line by then."""
    limits = patient(lease_seconds=1.5, worker_wait_seconds=2.0)
    loop = asyncio.get_running_loop()
    async with gateway(redis, limits=limits) as admission, asyncio.TaskGroup() as tasks:
        async with workers(redis, decode=10):
            first = Turn(tasks, admission, ticket("first"))
            await first.inside.wait()
            second = Turn(tasks, admission, ticket("second"))
            await until(lambda: admission.waiting == 1)
            await asyncio.sleep(1)
            left = loop.time()
        await asyncio.wait([second.task])
        assert isinstance(second.error, NoWorkers)
        assert loop.time() - left >= limits.worker_wait_seconds
        first.leave.set()


async def test_a_worker_that_comes_lets_the_waiting_in(redis: Redis) -> None:
    async with gateway(redis) as admission, asyncio.TaskGroup() as tasks:
        turn = Turn(tasks, admission, ticket())
        await until(lambda: admission.waiting == 1)
        async with workers(redis):
            await asyncio.wait_for(turn.inside.wait(), PATIENCE_SECONDS)
            turn.leave.set()
            await until(lambda: turn.task.done())
        assert turn.error is None


async def test_leases_of_a_dead_gateway_are_reaped(redis: Redis) -> None:
    limits = patient(lease_seconds=1.5)
    async with (
        workers(redis, decode=10, lease_seconds=limits.lease_seconds),
        gateway(redis, "alive", limits) as alive,
    ):
        dead = Admission(redis, "test", "dead", limits)
        running = asyncio.ensure_future(dead.run())
        await asyncio.wait_for(dead.until_available(), PATIENCE_SECONDS)
        stack = AsyncExitStack()
        await stack.enter_async_context(dead.turn(ticket("lost")))
        running.cancel()
        await asyncio.wait([running])
        async with asyncio.timeout(PATIENCE_SECONDS), alive.turn(ticket("next")):
            pass
        await stack.aclose()


async def test_a_dead_gateway_s_waiting_requests_do_not_take_room(redis: Redis) -> None:
    async with (
        workers(redis, decode=10),
        gateway(redis, "alive") as alive,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, alive, ticket("first"))
        await first.inside.wait()
        dead = Admission(redis, "test", "dead", LIMITS)
        running = asyncio.ensure_future(dead.run())
        await asyncio.wait_for(dead.until_available(), PATIENCE_SECONDS)
        ghost = Turn(tasks, dead, ticket("ghost"))
        await in_line(redis, 1, dead)
        running.cancel()
        await asyncio.wait([running])
        life = "baton:{test}:gateway:dead"
        assert 0 < await redis.pttl(life) <= 1000 * LIMITS.lease_seconds
        await redis.delete(life)  # as if that had passed, and long since Redis began
        await redis.hset(ROOM, "grace_until", 0)
        first.leave.set()
        async with asyncio.timeout(PATIENCE_SECONDS), alive.turn(ticket("next")):
            assert await redis.hget(ROOM, "grants") == b"2"
        ghost.task.cancel()


async def test_renewed_leases_last(redis: Redis) -> None:
    limits = patient(lease_seconds=1.5)
    async with (
        workers(redis, decode=10, lease_seconds=limits.lease_seconds),
        gateway(redis, limits=limits) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        second = Turn(tasks, admission, ticket("second"))
        await asyncio.sleep(limits.lease_seconds * 1.5)
        assert not second.inside.is_set()
        first.leave.set()
        await asyncio.wait_for(second.inside.wait(), PATIENCE_SECONDS)
        second.leave.set()


async def test_scripts_that_the_server_forgot_are_sent_again(redis: Redis) -> None:
    async with workers(redis), gateway(redis) as admission:
        await redis.script_flush()
        async with admission.turn(ticket()):
            pass


async def test_a_restart_of_redis_keeps_leases_and_places(mortal_server: LiveServer) -> None:
    async with (
        open_redis(RedisSection(url=mortal_server.url)) as redis,
        workers(redis, decode=10),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        second = Turn(tasks, admission, ticket("second"))
        await in_line(redis, 1, admission)
        mortal_server.kill()
        await until(lambda: not admission.available)
        with pytest.raises(QueueUnavailable):
            async with asyncio.timeout(0.2), admission.turn(ticket("third")):
                pass
        await mortal_server.start()
        await until(lambda: admission.available)
        assert not second.inside.is_set()
        first.leave.set()
        await asyncio.wait_for(second.inside.wait(), PATIENCE_SECONDS)
        second.leave.set()


async def test_an_outage_costs_nobody_a_lease_for_one_period(mortal_server: LiveServer) -> None:
    """A gateway that finds its way back more slowly than another keeps what it held."""
    limits = patient(lease_seconds=1.5)
    async with (
        open_redis(RedisSection(url=mortal_server.url)) as redis,
        workers(redis, decode=10, lease_seconds=limits.lease_seconds),
        gateway(redis, "fast", limits) as fast,
        AsyncExitStack() as stack,
    ):
        slow = Admission(redis, "test", "slow", limits)
        running = asyncio.ensure_future(slow.run())
        await asyncio.wait_for(slow.until_available(), PATIENCE_SECONDS)
        await stack.enter_async_context(slow.turn(ticket("held")))
        await mortal_server.logged()
        mortal_server.kill()
        running.cancel()
        await asyncio.wait([running])
        await asyncio.sleep(limits.lease_seconds * 1.2)
        await mortal_server.start()
        await until(lambda: fast.available)
        async with fast.turn(ticket("next")):
            restarted, granted = await redis.hmget(ROOM, "restarted_at", "granted_at")
            assert int(granted) - int(restarted) >= 1000 * limits.lease_seconds


async def test_gateways_claim_what_a_server_has_lost(mortal_server: LiveServer) -> None:
    lease_seconds = 1.5  # half of it passes before anybody is granted anything
    async with (
        open_redis(RedisSection(url=mortal_server.url)) as redis,
        workers(redis, decode=10, lease_seconds=lease_seconds),
        gateway(redis, limits=patient(lease_seconds=lease_seconds)) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket("first"))
        await first.inside.wait()
        second = Turn(tasks, admission, ticket("second"))
        await in_line(redis, 1, admission)
        mortal_server.kill()
        for file in mortal_server.folder.rglob("*.aof"):
            file.unlink()
        for file in mortal_server.folder.rglob("*.manifest"):
            file.unlink()
        await mortal_server.start()
        await until(lambda: admission.available)
        assert (await book(redis))["held_decode"] == 10
        await published(redis, 2)
        assert not second.inside.is_set()
        assert await waiting(redis) == 1
        first.leave.set()
        await asyncio.wait_for(second.inside.wait(), PATIENCE_SECONDS)
        second.leave.set()


async def test_a_lost_redis_fails_the_waiting_after_a_while(mortal_server: LiveServer) -> None:
    limits = patient(outage_seconds=0.2)
    async with (
        open_redis(RedisSection(url=mortal_server.url)) as redis,
        gateway(redis, limits=limits) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        turn = Turn(tasks, admission, ticket())
        await in_line(redis, 1, admission)
        mortal_server.kill()
        await until(turn.task.done)
        assert isinstance(turn.error, QueueUnavailable)
        await mortal_server.start()
        await until(lambda: admission.available)


async def test_a_mute_server_is_given_up(mortal_server: LiveServer) -> None:
    limits = patient(timeout_seconds=0.4)
    async with (
        open_redis(RedisSection(url=mortal_server.url)) as redis,
        gateway(redis, limits=limits) as admission,
    ):
        assert mortal_server.process is not None
        mortal_server.process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(QueueUnavailable):
                async with admission.turn(ticket()):
                    pass
        mortal_server.process.send_signal(signal.SIGCONT)
        await until(lambda: admission.available)
