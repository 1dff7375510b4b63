"""In which order the waiting are served: bands, tenants' shares, deadlines."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from redis.asyncio import Redis

from gateway.admission import Admission, Terms, Ticket
from gateway.errors import DeadlineExceeded
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

from .queueing import Turn, book, gateway, ticket, until, waiting, workers

COST = 10


class Line:
    """Tickets behind one that holds all room; served one after the other once it leaves."""

    def __init__(self, redis: Redis, tasks: asyncio.TaskGroup) -> None:
        self.order: list[str] = []
        self._redis = redis
        self._tasks = tasks
        self._count = 0

    async def join(self, admission: Admission, *tickets: Ticket) -> None:
        """In this order, and all of them before whoever joins next."""
        for one in tickets:
            self._tasks.create_task(self._take(admission, one))
            self._count += 1
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await waiting(self._redis) != self._count:
                    await asyncio.sleep(0)

    async def _take(self, admission: Admission, one: Ticket) -> None:
        async with admission.turn(one):
            self.order.append(one.id)

    async def served(self) -> list[str]:
        """The order, once all have been."""
        await until(lambda: len(self.order) == self._count)
        return self.order


@asynccontextmanager
async def lined_up(redis: Redis, *admissions: Admission) -> AsyncIterator[Line]:
    """Lets the line go on when the body ends."""
    async with asyncio.TaskGroup() as tasks:
        first = Turn(tasks, admissions[0], ticket("first", decode=COST, tenant="nobody"))
        await first.inside.wait()
        yield Line(redis, tasks)
        first.leave.set()


def of(
    tenant: str, number: int, *, weight: float = 1.0, cost: int = COST, **more: object
) -> Ticket:
    return ticket(
        f"{tenant}{number}",
        prefill=1,
        decode=cost,
        tenant=tenant,
        terms=Terms(weight=weight),
        **more,  # type: ignore[arg-type]
    )


async def test_two_gateways_serve_two_tenants_by_their_weights(redis: Redis) -> None:
    """Three to one within 5 %, of the grants in which both were waiting."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(workers(redis, decode=COST))
        one = await stack.enter_async_context(gateway(redis, "g1"))
        two = await stack.enter_async_context(gateway(redis, "g2"))
        async with lined_up(redis, one) as line:
            for number in range(80):
                await line.join(one if number % 2 else two, of("b", number, weight=1.0))
            for number in range(240):
                await line.join(one if number % 2 else two, of("a", number, weight=3.0))
        order = await line.served()
    counts = Counter(name[0] for name in order[:240])
    assert counts["a"] / counts["b"] == pytest.approx(3.0, rel=0.05)


async def test_shares_are_counted_in_tokens_and_not_in_requests(redis: Redis) -> None:
    async with workers(redis, decode=4 * COST), gateway(redis) as admission:
        async with lined_up(redis, admission) as line:
            hog = Turn(line._tasks, admission, of("hog", 0, cost=3 * COST))
            await hog.inside.wait()
            for number in range(12):
                await line.join(admission, of("long", number, cost=4 * COST))
            for number in range(48):
                await line.join(admission, of("brief", number))
            hog.leave.set()
        order = await line.served()
    counts = Counter(name.rstrip("0123456789") for name in order[:30])
    assert counts["brief"] / counts["long"] == pytest.approx(4.0, rel=0.2)


async def test_a_tenant_saves_nothing_up_while_it_is_away(redis: Redis) -> None:
    async with workers(redis, decode=COST), gateway(redis) as admission:
        async with lined_up(redis, admission) as line:
            for number in range(20):
                await line.join(admission, of("busy", number))
        await line.served()
        async with lined_up(redis, admission) as line:
            for number in range(6):
                await line.join(admission, of("busy", number))
            for number in range(6):
                await line.join(admission, of("late", number))
        order = await line.served()
    assert Counter(name.rstrip("0123456789") for name in order[:6]) == {"busy": 3, "late": 3}


async def test_a_tenant_s_own_requests_go_by_deadline(redis: Redis) -> None:
    async with workers(redis, decode=COST), gateway(redis) as admission:
        async with lined_up(redis, admission) as line:
            await line.join(admission, of("t", 9, seconds=90), of("t", 5, seconds=50))
            await line.join(admission, of("t", 7, seconds=70), of("u", 8, seconds=80))
        order = [name for name in await line.served() if name != "u8"]
    assert order == ["t5", "t7", "t9"]


async def test_low_bands_are_not_starved(redis: Redis) -> None:
    """One grant in eight goes below the highest band in which somebody waits."""
    async with workers(redis, decode=COST), gateway(redis) as admission:
        async with lined_up(redis, admission) as line:
            for number in range(40):
                await line.join(admission, of("high", number, priority=3))
            await line.join(admission, of("low", 0), of("lowest", 0, priority=-8))
        order = await line.served()
    assert {"low0", "lowest0"} <= set(order[:17])
    assert order.index("low0") < order.index("lowest0")


async def test_a_deadline_that_cannot_be_met_any_more_ends_the_wait(redis: Redis) -> None:
    async with workers(redis, decode=COST), gateway(redis) as admission:
        async with lined_up(redis, admission) as line:
            hopeless = ticket(seconds=LONG_SECONDS, needs_seconds=LONG_SECONDS - 0.2)
            with pytest.raises(DeadlineExceeded, match="queued"):
                async with asyncio.timeout(PATIENCE_SECONDS), admission.turn(hopeless):
                    pass
            with pytest.raises(DeadlineExceeded, match="queued"):
                async with admission.turn(ticket(seconds=30, needs_seconds=31)):
                    pass
            soon = asyncio.get_running_loop().time() + 0.1
            with pytest.raises(DeadlineExceeded, match="queued"):
                async with admission.turn(ticket(first_token_by=soon)):
                    pass
            await admission.flush(PATIENCE_SECONDS)
            assert await waiting(redis) == 0
        assert line.order == []


async def test_what_is_granted_at_once_is_not_called_late_by_an_estimate(redis: Redis) -> None:
    async with (
        workers(redis, decode=COST),
        gateway(redis) as admission,
        admission.turn(ticket(seconds=30, needs_seconds=31)),
    ):
        pass


async def test_once_the_first_token_is_there_only_the_deadline_counts(redis: Redis) -> None:
    async with workers(redis, decode=COST), gateway(redis) as admission:
        soon = asyncio.get_running_loop().time() + 0.5
        async with admission.turn(ticket(first_token_by=soon)) as grant:
            grant.prefilled()
            await asyncio.sleep(0.6)
            await asyncio.wait_for(grant.again("decode", "decode"), PATIENCE_SECONDS)


async def test_what_waits_is_counted_out_when_it_leaves(redis: Redis) -> None:
    """No key of order, line or band outlives those who stood there."""
    async with workers(redis, decode=COST), gateway(redis) as admission:
        async with lined_up(redis, admission) as line:
            await line.join(admission, of("t", 1), of("t", 2, priority=1), of("u", 3))
            leaver = Turn(line._tasks, admission, of("v", 4))
            await until(lambda: admission.waiting == 4)
            leaver.task.cancel()
        await line.served()
        await admission.flush(PATIENCE_SECONDS)
        for kind in ("bands", "order", "line", "waiting", "leases", "tickets"):
            assert await redis.keys(f"baton:{{test}}:{kind}:*") == []
        assert await book(redis) == {"held_prefill": 0, "held_decode": 0}
