"""Gateways, workers and turns for tests of the shared queue."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from redis.asyncio import Redis

from gateway.admission import Admission, Limits, Registration, Ticket, WorkerRecord
from gateway.errors import GatewayError
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

MODEL = "tiny"
ROOM = f"baton:{{test}}:room:{MODEL}"
LIMITS = Limits(
    max_waiting=1000,
    lease_seconds=LONG_SECONDS,
    worker_wait_seconds=LONG_SECONDS,
    outage_seconds=LONG_SECONDS,
    timeout_seconds=PATIENCE_SECONDS,
)


def patient(**changes: Any) -> Limits:
    """`LIMITS`, but for what a test is about.

    Where leases lapse, gateways and workers need the same: the queue goes by the longest.
    """
    return msgspec.structs.replace(LIMITS, **changes)


def ticket(
    request: str = "r",
    /,
    *,
    prefill: int = 10,
    decode: int = 10,
    seconds: float = LONG_SECONDS,
    priority: int = 0,
    **more: Any,
) -> Ticket:
    return Ticket(
        id=request,
        model=MODEL,
        tenant=more.pop("tenant", "t"),
        prefill_tokens=prefill,
        decode_tokens=decode,
        deadline=asyncio.get_running_loop().time() + seconds,
        priority=priority,
        **more,
    )


async def until(fact: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not fact():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def gateway(
    redis: Redis, name: str = "g1", limits: Limits = LIMITS
) -> AsyncIterator[Admission]:
    admission = Admission(redis, "test", name, limits)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(admission.run())
        await asyncio.wait_for(admission.until_available(), PATIENCE_SECONDS)
        await listens(redis, admission, name)
        yield admission
        await admission.flush(PATIENCE_SECONDS)
        running.cancel()


async def listens(redis: Redis, admission: Admission, name: str) -> None:
    """Return once it hears of grants, and has asked what it may have missed before."""
    channel = f"baton:{{test}}:grants:{name}"
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await redis.pubsub_numsub(channel))[0][1] != 1:
            await asyncio.sleep(0.005)
    await admission._renew()


@asynccontextmanager
async def workers(
    redis: Redis,
    *,
    prefill: int = 100,
    decode: int = 100,
    lease_seconds: float = LONG_SECONDS,
    timeout_seconds: float = PATIENCE_SECONDS,
) -> AsyncIterator[None]:
    """A prefill and a decode worker that are registered, and offer that many tokens."""
    async with asyncio.TaskGroup() as tasks:
        stop = asyncio.Event()
        for role in ("prefill", "decode"):
            record = WorkerRecord(
                id=role,
                incarnation=1,
                role=role,
                model=MODEL,
                address=f"unix:/nowhere/{role}",
                prefill_tokens=prefill if role == "prefill" else 0,
                decode_tokens=decode if role == "decode" else 0,
            )
            registration = Registration(
                redis,
                "test",
                record,
                lease_seconds=lease_seconds,
                timeout_seconds=timeout_seconds,
            )
            tasks.create_task(registration.run(stop))
        await published(redis, 2)
        yield
        stop.set()


@asynccontextmanager
async def two_gateways(
    redis: Redis, *, prefill: int = 100, decode: int, limits: Limits = LIMITS
) -> AsyncIterator[tuple[Admission, Admission]]:
    """Two of them before such workers, whose leases are as long as theirs."""
    async with (
        workers(redis, prefill=prefill, decode=decode, lease_seconds=limits.lease_seconds),
        gateway(redis, "g1", limits) as one,
        gateway(redis, "g2", limits) as two,
    ):
        yield one, two


async def published(redis: Redis, count: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await redis.zcard("baton:{test}:workers") != count:
            await asyncio.sleep(0.01)


class Turn:
    """A turn taken by a task of its own, so that a test sees how far it got."""

    def __init__(self, tasks: asyncio.TaskGroup, admission: Admission, wish: Ticket) -> None:
        self.inside = asyncio.Event()
        self.leave = asyncio.Event()
        self.error: BaseException | None = None
        self.task = tasks.create_task(self._run(admission, wish))

    async def _run(self, admission: Admission, wish: Ticket) -> None:
        try:
            async with admission.turn(wish) as self.grant:
                self.inside.set()
                await self.leave.wait()
        except GatewayError as error:
            self.error = error


async def waiting(redis: Redis) -> int:
    return await redis.zcard("baton:{test}:waiting:" + MODEL)


async def in_line(redis: Redis, count: int, *gates: Admission) -> None:
    """Return once so many tickets stand in line, and these gateways know of theirs.

    Who has not heard so when Redis goes is told so, and does not stand there again.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await waiting(redis) != count:
            await asyncio.sleep(0.005)
        for gate in gates:
            await heard(gate)


async def heard(admission: Admission) -> None:
    """Return once whatever this gateway has asked has been answered: answers come in order.

    What Redis has done, others may see before the one that asked for it.
    """
    await admission._renew_model(MODEL)


async def book(redis: Redis) -> dict[str, int]:
    entries = await redis.hgetall(ROOM)
    return {key.decode(): int(value) for key, value in entries.items() if b"held" in key}
