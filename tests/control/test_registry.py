"""What gateways know of workers, through real Redis servers."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest
from redis.asyncio import Redis

from gateway.admission import Registration, Registry, WorkerRecord, open_redis, registry
from gateway.config import RedisSection
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

from .conftest import LiveServer
from .queueing import until

RECORD = WorkerRecord(
    id="w",
    incarnation=1,
    role="both",
    model="tiny",
    address="unix:/nowhere",
    prefill_tokens=10,
    decode_tokens=20,
)
LEASE_SECONDS = 2.0


@asynccontextmanager
async def registered(redis: Redis, record: WorkerRecord = RECORD) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        registration = Registration(redis, "test", record, lease_seconds=LEASE_SECONDS)
        tasks.create_task(registration.run(stop))
        yield stop
        stop.set()


@asynccontextmanager
async def watched(redis: Redis) -> AsyncIterator[list[Mapping[str, WorkerRecord]]]:
    news: list[Mapping[str, WorkerRecord]] = []
    async with asyncio.TaskGroup() as tasks:
        known = Registry(redis, "test", lease_seconds=LEASE_SECONDS)
        watching = tasks.create_task(known.watch(news.append))
        yield news
        watching.cancel()


async def test_a_worker_is_known_while_it_is_there(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "POLL_SECONDS", LONG_SECONDS)  # it is told, and need not ask
    async with watched(redis) as news:
        channel = "baton:{test}:nudges"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await redis.pubsub_numsub(channel))[0][1] != 1:
                await asyncio.sleep(0.005)
        async with registered(redis):
            await until(lambda: news and news[-1] == {"w": RECORD})
            await asyncio.sleep(LEASE_SECONDS * 1.5)
            assert len(news) == 1, "a record that is repeated is no news"
        await until(lambda: news[-1] == {})


async def test_a_worker_that_falls_silent_is_forgotten(redis: Redis) -> None:
    registration = Registration(redis, "test", RECORD, lease_seconds=LEASE_SECONDS)
    async with watched(redis) as news:
        running = asyncio.ensure_future(registration.run(asyncio.Event()))
        await until(lambda: news and news[-1] == {"w": RECORD})
        running.cancel()
        await asyncio.wait([running])
        seconds, _ = await redis.time()
        assert await redis.zscore("baton:{test}:workers", "w") <= 1000 * (
            seconds + 1 + LEASE_SECONDS
        )
        await until(lambda: news[-1] == {})
        offers = await redis.hgetall("baton:{test}:credits:tiny")
        assert list(offers) == [b"w"], "its offer is counted out by the next call that looks"


async def test_a_later_incarnation_takes_the_name(redis: Redis) -> None:
    later = msgspec.structs.replace(RECORD, incarnation=2, address="unix:/later")
    async with watched(redis) as news, registered(redis):
        await until(lambda: news and news[-1] == {"w": RECORD})
        async with registered(redis, later):
            await until(lambda: news[-1] == {"w": later})
            await asyncio.sleep(LEASE_SECONDS)  # the older one goes on trying
            assert news[-1] == {"w": later}


async def test_an_older_incarnation_does_not_take_the_later_one_away(redis: Redis) -> None:
    later = msgspec.structs.replace(RECORD, incarnation=2)
    async with watched(redis) as news, registered(redis, later):
        await until(lambda: news and news[-1] == {"w": later})
        async with registered(redis):
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.2)
        assert news == [{"w": later}]


async def test_workers_outlive_an_outage_of_redis(mortal_server: LiveServer) -> None:
    """Also one that took all data with it, and from which a worker returns later than we do."""
    async with open_redis(RedisSection(url=mortal_server.url)) as redis, watched(redis) as news:
        registration = Registration(redis, "test", RECORD, lease_seconds=LEASE_SECONDS)
        running = asyncio.ensure_future(registration.run(asyncio.Event()))
        await until(lambda: news and news[-1] == {"w": RECORD})
        mortal_server.kill()
        running.cancel()
        await asyncio.wait([running])
        for pattern in ("*.aof", "*.manifest"):
            for file in mortal_server.folder.rglob(pattern):
                file.unlink()
        await mortal_server.start()
        await asyncio.sleep(LEASE_SECONDS / 4)
        async with registered(redis):
            await asyncio.sleep(LEASE_SECONDS * 2)
            assert news == [{"w": RECORD}]
        await until(lambda: news[-1] == {})
