"""What was adopted from another gateway is in the queue's books like everything that runs."""

import asyncio
from typing import Any

import msgspec
import pytest

from tests.life.cluster import Cluster, Heard
from tests.life.test_adoption import LASTING, SLOW, Gateway, gateways, left_alone, ready
from tests.life.test_relay import alone, pair
from tests.support.patience import PATIENCE_SECONDS


async def leases(made: Cluster) -> dict[str, str]:
    """Whose lease on what there is: the gateway, by the ticket's name."""
    prefix, model = f"baton:{{{made.deployment}}}", made.job([1]).model
    names = await made.redis.zrange(f"{prefix}:leases:{model}", 0, -1)
    tickets = [await made.redis.hget(f"{prefix}:tickets:{model}", name) for name in names]
    return {
        name.decode(): msgspec.msgpack.decode(ticket)["gateway"]
        for name, ticket in zip(names, tickets, strict=True)
        if ticket is not None  # it was given back just now
    }


async def until_leased(made: Cluster, wanted: dict[str, str]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await leases(made) != wanted:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("known", [True, False], ids=["with its lease", "when that has lapsed"])
async def test_what_is_adopted_holds_a_lease_until_it_ends(redis_url: str, known: bool) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job = made.job([1, 2, 3], max_tokens=LASTING)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 5)
        name = f"{job.id}/0"
        await until_leased(made, {name: "g1"})
        await first.die()
        if not known:
            prefix = f"baton:{{{made.deployment}}}"
            await made.redis.zrem(f"{prefix}:leases:{job.model}", name)
            await made.redis.hdel(f"{prefix}:tickets:{job.model}", name)
        resuming = asyncio.ensure_future(second.resume(job))
        await until_leased(made, {name: "g2"})
        again = await resuming
        await until_leased(made, {})
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
    assert again.tokens == await alone(redis_url, [1, 2, 3], max_tokens=LASTING)


async def test_what_is_adopted_goes_on_when_the_queue_has_no_room(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job = made.job([1, 2, 3], max_tokens=60)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 5)
        await first.die()
        again = await without_queue(second, job)
        await left_alone(made)
    assert again.tokens == await alone(redis_url, [1, 2, 3], max_tokens=60)


async def without_queue(gateway: Gateway, job: Any) -> Heard:
    """Resume while this gateway's queue is away; its records are not."""
    gateway.parts[0].cancel()
    await asyncio.wait([gateway.parts[0]])
    again = await gateway.resume(job)
    await gateway.records.flush(PATIENCE_SECONDS)
    return again
