"""Records of requests that may be asked for again: whose they are, and for how long."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from backends.protocol import Logprob
from gateway.admission import open_redis
from gateway.config import RedisSection
from gateway.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    GatewayError,
    KeyReused,
    NoWorkers,
    QueueFull,
    QueueUnavailable,
    Repeated,
    RequestUnknown,
    TakenOver,
)
from gateway.resume import Answer, Claim, Ended, JobAnswer, Records, Retention, Saved
from gateway.resume.records import body_digest
from tests.support.patience import PATIENCE_SECONDS


def saved(name: str = "r1", *, body: bytes = b"{}", prompts: int = 1) -> Saved:
    return Saved(
        id=name,
        route="chat",
        body=body,
        created=7,
        seed=5,
        prompts=tuple([1, 2, number] for number in range(prompts)),
    )


class Site:
    """Two gateways' records in one Redis."""

    def __init__(self, redis: Any, deployment: str, tasks: asyncio.TaskGroup) -> None:
        self.redis = redis
        self.deployment = deployment
        self._tasks = tasks
        self.running: list[asyncio.Task[None]] = []

    async def gateway(self, name: str, **limits: Any) -> Records:
        records = Records(self.redis, self.deployment, name, Retention(**limits))
        self.running.append(self._tasks.create_task(records.run()))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await records.until_available()
        return records


@pytest.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    deployment = f"test-{time.time_ns()}"
    async with open_redis(RedisSection(url=redis_url)) as redis, asyncio.TaskGroup() as tasks:
        made = Site(redis, deployment, tasks)
        yield made
        litter = [key for key in await redis.keys(f"*{deployment}*") if await redis.pttl(key) < 0]
        assert not litter
        for task in made.running:
            task.cancel()


@asynccontextmanager
async def repeated(claim: Claim) -> AsyncIterator[Claim]:
    with pytest.raises(Repeated) as caught:
        await claim.secured()
    yield caught.value.claim


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.005)


ANSWER = JobAnswer((Ended([4, 5], "length", [Logprob(4, -1.0)]),), ())


async def test_the_same_key_finds_the_request_again_and_raises_its_epoch(site: Site) -> None:
    first, second = await site.gateway("g1"), await site.gateway("g2")
    claim = first.open("t", "key", saved(), seconds=60)
    await claim.secured()
    assert (claim.epoch, claim.resumed) == (1, False)
    again = second.open("t", "key", saved("r2"), seconds=60)
    async with repeated(again) as found:
        assert (found.id, found.epoch, found.resumed) == ("r1", 2, True)
        assert found.saved == saved()
        assert 50 < found.left <= 60
        assert found.answer is None


async def test_a_key_is_its_tenants_alone(site: Site) -> None:
    first, second = await site.gateway("g1"), await site.gateway("g2")
    await first.open("t", "key", saved(), seconds=60).secured()
    await second.open("u", "key", saved("r2"), seconds=60).secured()
    with pytest.raises(RequestUnknown):
        await second.take("u", "r1")
    with pytest.raises(RequestUnknown):
        await second.take("t", "r3")
    assert (await second.take("t", "r1")).epoch == 2


async def test_another_body_under_the_same_key_is_refused(site: Site) -> None:
    records = await site.gateway("g1")
    await records.open("t", "key", saved(), seconds=60).secured()
    with pytest.raises(KeyReused, match="Idempotency-Key"):
        await records.open("t", "key", saved("r2", body=b"[]"), seconds=60).secured()
    with pytest.raises(KeyReused):
        await records.take("t", "r1", body=body_digest("completion", b"{}"))
    assert (await records.take("t", "r1", body=body_digest("chat", b"{}"))).epoch == 2


async def test_a_former_owner_settles_and_drops_nothing(site: Site) -> None:
    first, second = await site.gateway("g1"), await site.gateway("g2")
    released: list[bool] = []
    claim = first.open("t", "key", saved(), seconds=60)
    await claim.secured()
    newer = await second.take("t", "r1")
    claim.ended(0, ANSWER, released.append)
    await until(lambda: released)
    assert released == [False]
    third = await second.take("t", "r1")
    assert third.answer is None
    newer.failed(NoWorkers("none"), told=False)
    await second.flush(PATIENCE_SECONDS)
    third.ended(0, ANSWER, released.append)
    await until(lambda: len(released) == 2)
    assert released[1]
    assert (await second.take("t", "r1")).answer == Answer((ANSWER,))


async def test_an_answer_is_settled_once_all_jobs_have_ended(site: Site) -> None:
    records = await site.gateway("g1")
    released: list[bool] = []
    claim = records.open("t", "", saved(prompts=2), seconds=60)
    await claim.secured()
    claim.ended(1, ANSWER, released.append)
    claim.close()
    assert released == [False]
    assert (await records.take("t", "r1")).answer is None


@pytest.mark.parametrize(
    ("error", "told", "known"),
    [
        (NoWorkers("none"), False, False),
        (NoWorkers("none"), True, True),
        (DeadlineExceeded("decoding"), True, False),
        (TakenOver("r1"), False, True),
    ],
)
async def test_what_failed_begins_anew_unless_some_of_it_was_told(
    site: Site, error: GatewayError, told: bool, known: bool
) -> None:
    records = await site.gateway("g1")
    claim = records.open("t", "key", saved(), seconds=60)
    await claim.secured()
    claim.failed(error, told=told)
    claim.close()
    await records.flush(PATIENCE_SECONDS)
    again = records.open("t", "key", saved("r2"), seconds=60)
    if known:
        async with repeated(again):
            pass
    else:
        await again.secured()


async def test_records_are_bounded_in_number_and_size(site: Site) -> None:
    records = await site.gateway("g1", max_records=2, max_bytes=2000)
    with pytest.raises(BodyTooLarge):
        records.open("t", "", saved(body=b" " * 2000), seconds=60)
    for number in range(2):
        await records.open("t", "", saved(f"r{number}"), seconds=60).secured()
    with pytest.raises(QueueFull):
        await records.open("t", "", saved("r2"), seconds=60).secured()


async def test_an_answer_that_is_too_large_stays_with_the_workers(site: Site) -> None:
    records = await site.gateway("g1", max_bytes=1024)
    released: list[bool] = []
    claim = records.open("t", "", saved(), seconds=60)
    await claim.secured()
    claim.ended(0, JobAnswer((Ended([70000] * 1000, None, []),), ()), released.append)
    assert released == [False]


async def test_records_lapse(site: Site) -> None:
    records = await site.gateway("g1", keep_seconds=0.1, answer_seconds=0.1)
    claim = records.open("t", "key", saved(), seconds=0.1)
    await claim.secured()
    claim.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await site.redis.keys(f"*{site.deployment}*"):
            await asyncio.sleep(0.01)


async def test_what_redis_forgot_it_is_told_again(site: Site) -> None:
    first, second = await site.gateway("g1"), await site.gateway("g2")
    claim = first.open("t", "key", saved(), seconds=60)
    await claim.secured()
    mine = await second.take("t", "r1")
    await site.redis.delete(*await site.redis.keys(f"*{site.deployment}*"))
    await site.redis.client_kill_filter(_type="normal", skipme=True)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await site.redis.keys(f"*{site.deployment}*record:r1"):
            await asyncio.sleep(0.01)
    # Whichever of the two came first: a worker knows a higher epoch, and only the owner outbids.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await site.redis.hget(f"baton:{{{site.deployment}}}:record:r1", "epoch") != b"2":
            await asyncio.sleep(0.01)
    with pytest.raises(TakenOver):
        await claim.outbid(7)
    await mine.outbid(7)
    assert mine.epoch == 8
    assert (await first.take("t", "r1")).saved == saved()


async def test_without_redis_nothing_is_opened(redis_url: str) -> None:
    async with open_redis(RedisSection(url=redis_url)) as redis:
        records = Records(redis, "nowhere", "g", Retention())
        with pytest.raises(QueueUnavailable):
            records.open("t", "", saved(), seconds=60)
        with pytest.raises(QueueUnavailable):
            await records.take("t", "r1")


def test_a_saved_request_survives_its_packing() -> None:
    one = saved(body=b"\xff\x00", prompts=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=Saved) == one
