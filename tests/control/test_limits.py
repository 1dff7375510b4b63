"""What a tenant may use, and what it is charged."""

import asyncio

import pytest
from redis.asyncio import Redis

from gateway.admission import Admission, Terms
from gateway.errors import QueueFull, TenantOverLimit
from gateway.quota import Quota
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

from .queueing import (
    LIMITS,
    MODEL,
    ROOM,
    Turn,
    gateway,
    heard,
    in_line,
    patient,
    ticket,
    two_gateways,
    until,
    workers,
)


async def quota(redis: Redis, tenant: str = "t") -> dict[str, float]:
    stored = await redis.hgetall("baton:{test}:quota:" + tenant)
    return {name.decode(): float(value) for name, value in stored.items()}


async def clock(redis: Redis) -> float:
    """The server's, by which buckets fill."""
    seconds, micros = await redis.time()
    return seconds + micros / 1e6


async def since(redis: Redis, began: float) -> float:
    """Seconds at most that have passed for a script, which rounds to milliseconds twice."""
    return await clock(redis) - began + 0.002


async def over_limit(admission: Admission, **more: object) -> TenantOverLimit:
    with pytest.raises(TenantOverLimit) as caught:
        async with admission.turn(ticket(**more)):  # type: ignore[arg-type]
            pass
    return caught.value


async def test_requests_beyond_the_minute_s_are_refused_and_told_when_to_come_back(
    redis: Redis,
) -> None:
    terms = Terms(requests=3)
    told: list[Quota] = []
    async with workers(redis), gateway(redis) as admission:
        began = await clock(redis)
        for _ in range(3):
            async with admission.turn(ticket(terms=terms), told=told.append):
                pass
        assert [one.requests.remaining for one in told if one.requests] == [2, 1, 0]
        error = await over_limit(admission, terms=terms)
        passed = await since(redis, began)
        assert 20 - passed <= error.retry_after <= 20
        assert error.quota.requests is not None
        assert error.quota.requests.limit == 3
        assert error.quota.requests.remaining == 0
        assert 60 - passed <= error.quota.requests.reset_seconds <= 60
        async with admission.turn(ticket(terms=terms, tenant="another")):
            pass


async def test_two_gateways_let_in_exactly_what_is_allowed(redis: Redis) -> None:
    """Check and debit are one: 40 at once, from two sides, and 7 come through."""
    terms = Terms(requests=7)
    inside = refused = 0

    async def take(admission: Admission) -> None:
        nonlocal inside, refused
        try:
            async with admission.turn(ticket(terms=terms)):
                inside += 1
        except TenantOverLimit:
            refused += 1

    async with (
        two_gateways(redis, decode=1000, prefill=1000) as (one, two),
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(40):
            tasks.create_task(take(one if number % 2 else two))
    assert (inside, refused) == (7, 33)


async def test_a_bucket_fills_by_itself_and_not_in_steps(redis: Redis) -> None:
    terms = Terms(requests=6)  # one in ten seconds
    async with workers(redis, decode=10000, prefill=10000), gateway(redis) as admission:
        await redis.hset("baton:{test}:quota:t", mapping={"at": 1, "requests": -60000})
        await redis.pexpire("baton:{test}:quota:t", 60000)
        async with admission.turn(ticket(terms=terms)):
            pass
        assert (await quota(redis))["requests"] == pytest.approx(5, abs=0.1)
        began = await clock(redis)
        half = {"at": int(began * 1000), "requests": 0.5}
        await redis.hset("baton:{test}:quota:t", mapping=half)
        error = await over_limit(admission, terms=terms)
        assert 5 - await since(redis, began) <= error.retry_after <= 5
        half["at"] -= 5000  # as if they had passed
        await redis.hset("baton:{test}:quota:t", mapping=half)
        async with admission.turn(ticket(terms=terms)):
            pass


async def test_decode_tokens_are_settled_to_what_was_generated(redis: Redis) -> None:
    terms = Terms(decode_tokens=1000, prefill_tokens=1000)
    async with workers(redis, decode=1000), gateway(redis) as admission:
        began = await clock(redis)
        for expected, generated in ((400, 100), (100, 400)):
            wish = ticket(terms=terms, expected_tokens=expected)
            async with admission.turn(wish, generated=lambda count=generated: count) as grant:
                grant.prefilled()
                await admission.flush(PATIENCE_SECONDS)
            await admission.flush(PATIENCE_SECONDS)
        left = await quota(redis)
        assert 500 <= left["decode"] <= 500 + await since(redis, began) * 1000 / 60
        assert left["prefill"] == pytest.approx(980, abs=20)


async def test_an_answer_that_is_longer_than_expected_makes_a_debt(redis: Redis) -> None:
    """Also when the bucket was full again, and forgotten, before it ended."""
    terms = Terms(decode_tokens=60)
    async with workers(redis, decode=1000), gateway(redis) as admission:
        began = await clock(redis)
        async with admission.turn(ticket(terms=terms, expected_tokens=1), generated=lambda: 100):
            await redis.delete("baton:{test}:quota:t")
        await admission.flush(PATIENCE_SECONDS)
        assert (await quota(redis))["decode"] == pytest.approx(-39)
        lives = await redis.pttl("baton:{test}:quota:t")
        error = await over_limit(admission, terms=terms, expected_tokens=1)
        passed = await since(redis, began)
        assert lives >= 1000 * (99 - passed)
        assert 40 - passed <= error.retry_after <= 40


async def test_a_request_larger_than_a_minute_s_worth_is_let_in_when_the_bucket_is_full(
    redis: Redis,
) -> None:
    terms = Terms(prefill_tokens=50)
    async with workers(redis, prefill=1000), gateway(redis) as admission:
        began = await clock(redis)
        async with admission.turn(ticket(terms=terms, prefill=150), generated=lambda: 1):
            pass
        await admission.flush(PATIENCE_SECONDS)
        error = await over_limit(admission, terms=terms, prefill=1)
        assert 121 - await since(redis, began) <= error.retry_after <= 122


async def test_what_never_ran_costs_no_tokens(redis: Redis) -> None:
    terms = Terms(prefill_tokens=1000, decode_tokens=1000)
    async with (
        workers(redis, decode=10),
        gateway(redis) as admission,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, admission, ticket())
        await first.inside.wait()
        second = Turn(tasks, admission, ticket(terms=terms, expected_tokens=500))
        await until(lambda: admission.waiting == 1)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await quota(redis)).get("decode", 1000) > 600:
                await asyncio.sleep(0.005)
        second.task.cancel()
        await asyncio.wait([second.task])
        await admission.flush(PATIENCE_SECONDS)
        left = await quota(redis)
        assert (left["prefill"], left["decode"]) == (1000, 1000)
        first.leave.set()


async def test_a_refusal_by_a_full_line_costs_nothing(redis: Redis) -> None:
    limits = patient(max_waiting=0)
    terms = Terms(requests=10, prefill_tokens=100, concurrent=5)
    async with (
        workers(redis, decode=10),
        gateway(redis, limits=limits) as admission,
        admission.turn(ticket()),
    ):
        with pytest.raises(QueueFull) as caught:
            async with admission.turn(ticket(terms=terms)):
                pass
        assert caught.value.retry_after is not None
        assert 1 <= caught.value.retry_after <= 30
        assert await quota(redis) == {}
        assert await redis.exists("baton:{test}:active:t") == 0


async def test_a_request_that_is_enqueued_again_is_charged_once(redis: Redis) -> None:
    """A repeated call, a place that was given back, and a refusal by a worker."""
    terms = Terms(requests=2, prefill_tokens=20, decode_tokens=20, concurrent=9)
    async with workers(redis, decode=100), gateway(redis) as admission:
        async with admission.turn(ticket(terms=terms, expected_tokens=10)) as grant:
            (turn,) = admission._turns.values()
            await admission._enqueue(turn)
            await admission._enqueue(turn, again=True)
            await grant.again("decode", "decode")
            left = await quota(redis)
            assert left["requests"] == pytest.approx(1, abs=0.9)
            assert left["decode"] == pytest.approx(10, abs=9)
            assert await redis.scard("baton:{test}:active:t") == 1
        await admission.flush(PATIENCE_SECONDS)
        assert await redis.exists("baton:{test}:active:t") == 0


async def test_no_more_run_or_wait_at_once_than_allowed(redis: Redis) -> None:
    terms = Terms(concurrent=2)
    async with workers(redis, decode=10), gateway(redis) as admission:
        async with asyncio.TaskGroup() as tasks:
            running = Turn(tasks, admission, ticket(terms=terms))
            await running.inside.wait()
            lined_up = Turn(tasks, admission, ticket(terms=terms))
            await in_line(redis, 1)
            await over_limit(admission, terms=terms)
            part = Turn(tasks, admission, ticket(terms=terms, counts=False))  # of one of them
            await in_line(redis, 2)
            running.leave.set()
            await lined_up.inside.wait()
            lined_up.leave.set()
            await part.inside.wait()
            part.leave.set()
        await admission.flush(PATIENCE_SECONDS)
        async with admission.turn(ticket(terms=terms)):
            pass


async def test_a_dead_gateway_s_requests_stop_counting(redis: Redis) -> None:
    terms = Terms(concurrent=1)
    async with workers(redis), gateway(redis, "alive") as alive:
        dead = Admission(redis, "test", "dead", LIMITS)
        running = asyncio.ensure_future(dead.run())
        await asyncio.wait_for(dead.until_available(), PATIENCE_SECONDS)
        turn = dead.turn(ticket(terms=terms))
        await turn.__aenter__()
        await over_limit(alive, terms=terms)
        running.cancel()
        await asyncio.wait([running])
        (name,) = dead._turns
        # As if its lease had passed, and long since Redis began.
        await redis.zadd("baton:{test}:leases:" + MODEL, {name: 1})
        await redis.hset(ROOM, "grace_until", 0)
        await heard(alive)
        assert not await redis.exists("baton:{test}:active:t")
        async with alive.turn(ticket(terms=terms)):
            pass
        await turn.__aexit__(None, None, None)


async def test_tokens_of_those_who_died_waiting_come_back(redis: Redis) -> None:
    terms = Terms(decode_tokens=1000)
    async with (
        workers(redis, decode=10),
        gateway(redis, "alive") as alive,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, alive, ticket())
        await first.inside.wait()
        dead = Admission(redis, "test", "dead", LIMITS)
        running = asyncio.ensure_future(dead.run())
        await asyncio.wait_for(dead.until_available(), PATIENCE_SECONDS)
        ghost = Turn(tasks, dead, ticket(terms=terms, expected_tokens=900))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await quota(redis)).get("decode", 1000) > 200:
                await asyncio.sleep(0.005)
        (name,) = dead._turns
        running.cancel()
        ghost.task.cancel()
        await asyncio.wait([running, ghost.task])
        line = "baton:{test}:waiting:" + MODEL
        seconds, _ = await redis.time()
        assert seconds < await redis.zscore(line, name) / 1000 < seconds + 1 + LONG_SECONDS
        assert await redis.zadd(line, {name: 1}, xx=True, ch=True)
        await heard(alive)  # after the time at which it gave up, as it seems now
        assert (await quota(redis))["decode"] == 1000
        first.leave.set()
