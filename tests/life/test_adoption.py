"""A gateway dies, hangs, or loses its client, and another goes on at the next token."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.protocol import Sampling
from gateway.admission import Admission
from gateway.errors import ContinuationLost, QueueUnavailable, Repeated, TakenOver
from gateway.life.fleet import Fleet
from gateway.life.job import Job
from gateway.life.relay import Relay
from gateway.resume import Claim, Records, Retention, Saved
from tests.life.cluster import DECODE, LIMITS, SHAPE, Cluster, Heard, cluster
from tests.life.test_relay import alone, pair
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

SLOW = {"step_seconds": 0.004}
KEEP = PATIENCE_SECONDS
LASTING = 600
"""As many tokens as no other gateway is too late for, however busy the machine."""


class Gateway:
    """One more gateway of the cluster, as far as the control plane goes."""

    def __init__(self, made: Cluster, name: str, keep: float) -> None:
        redis, deployment = made.redis, made.deployment
        self.made = made
        self.admission = Admission(redis, deployment, name, LIMITS)
        self.fleet = Fleet(name, "")
        self.relay = Relay(
            self.admission, self.fleet, max_retries=3, worker_wait_seconds=PATIENCE_SECONDS
        )
        self.records = Records(redis, deployment, name, Retention(keep_seconds=keep))
        self.carrying: list[asyncio.Task[Any]] = []
        parts = (self.admission.run(), self.fleet.run(), self.records.run())
        self.parts = [made._tasks.create_task(part) for part in parts]

    def open(self, job: Job, key: str = "") -> Claim:
        saved = Saved(id=job.id, route="chat", body=b"", created=1, seed=1, prompts=(job.prompt,))
        return self.records.open(job.tenant, key, saved, seconds=LONG_SECONDS)

    def begin(self, job: Job, heard: Heard, claim: Claim, *told: int) -> asyncio.Task[Any]:
        async def carry() -> Any:
            try:
                (part,) = claim.jobs(told, job.n)
                mine = msgspec.structs.replace(job, claim=part)
                return await self.relay.carry(mine, heard)
            finally:
                claim.close()

        task = asyncio.ensure_future(carry())
        self.carrying.append(task)
        return task

    async def resume(self, job: Job, *told: int) -> Heard:
        """All that the request has, as a client that comes back gets it."""
        heard = Heard()
        claim = await self.records.take(job.tenant, job.id)
        await self.begin(job, heard, claim, *told)
        return heard

    async def die(self) -> None:
        """As SIGKILL: nothing more is said to anybody."""
        for worker in self.fleet.workers:
            worker._link.abort("killed")
        tasks = [*self.parts, *self.carrying]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def knows(self, count: int) -> None:
        await self.made.until(lambda: len(self.fleet.workers) >= count)
        await self.made.until(lambda: self.admission.available)
        await self.records.until_available()


@asynccontextmanager
async def gateways(
    url: str, *, keep: float = KEEP
) -> AsyncIterator[tuple[Cluster, Gateway, Gateway]]:
    async with cluster(url) as made:
        first, second = Gateway(made, "g1", keep), Gateway(made, "g2", keep)
        learn = made.fleet.update

        def update(records: Any) -> None:
            for fleet in (first.fleet, second.fleet):
                fleet.update(records)
            learn(records)

        made.fleet.update = update  # type: ignore[method-assign]
        await first.knows(0)
        await second.knows(0)
        try:
            yield made, first, second
        finally:
            for task in [*first.parts, *second.parts]:
                task.cancel()


async def ready(made: Cluster, *gateways: Gateway) -> None:
    count = len(made.hosts)
    for gateway in gateways:
        await gateway.knows(count)
        await made.until(lambda gateway=gateway: gateway.fleet.snapshot().pairs)


async def left_alone(made: Cluster) -> None:
    """No worker keeps or holds anything."""
    await made.until(lambda: all(host._requests.idle for host in made.hosts.values()))
    await made.balanced()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("how", ["dies", "loses its client", "hangs"])
async def test_another_gateway_goes_on_with_the_very_tokens(
    redis_url: str, how: str, n: int
) -> None:
    prompt, length = list(range(40)), LASTING if how == "hangs" else 80
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job = made.job(prompt, n=n, max_tokens=length)
        heard = Heard()
        carrying = first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(n - 1, ())) > 20)
        if how == "dies":
            await first.die()
        elif how == "loses its client":
            carrying.cancel()
            await asyncio.wait([carrying])
        again = await second.resume(job)
        if how == "hangs":
            with pytest.raises(TakenOver):
                await carrying
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
        assert made.hosts["d"]._requests.landings._count == 1  # nothing was computed again
    expected = await alone(redis_url, prompt, n=n, max_tokens=length)
    assert again.tokens == expected
    assert again.finish == dict.fromkeys(range(n), "length")
    for index, line in heard.tokens.items():
        assert expected[index][: len(line)] == line


async def test_the_same_gateway_takes_over_from_its_own_older_connection(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, _):
        await pair(made, **SLOW)
        await ready(made, first)
        job = made.job([1, 2, 3], n=2, max_tokens=LASTING)
        heard = Heard()
        carrying = first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(1, ())) > 10)
        again = await first.resume(job)
        with pytest.raises(TakenOver):
            await carrying
        await first.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
    assert again.tokens == await alone(redis_url, [1, 2, 3], n=2, max_tokens=LASTING)


@pytest.mark.parametrize("seed", range(24))
async def test_at_whatever_moment_it_dies_no_token_is_lost(redis_url: str, seed: int) -> None:
    dice = random.Random(seed)
    prompt = list(range(dice.randint(1, 300)))
    n, length = dice.randint(1, 3), dice.choice([1, 2, 5, 30])
    slow = {"step_seconds": 0.002, "prefill_seconds_per_token": 0.0002}
    # Who dies between settling the record and the release leaves tokens until the lease ends.
    async with gateways(redis_url, keep=2.0) as (made, first, second):
        await pair(made, **slow)
        if dice.random() < 0.3:
            await made.start("b", "both", **DECODE, **slow)
        await ready(made, first, second)
        job = made.job(prompt, n=n, max_tokens=length, sampling=Sampling(logprobs=1))
        heard = Heard()
        claim = first.open(job)
        await claim.secured()
        carrying = first.begin(job, heard, claim)
        await asyncio.sleep(dice.random() * 0.12)
        if dice.random() < 0.5:
            await first.die()
        elif dice.random() < 0.5:
            carrying.cancel()
            await asyncio.wait([carrying])
        told = tuple(len(heard.tokens.get(index, ())) for index in range(n))
        again = await second.resume(job, *told)
        await asyncio.wait([carrying])
        await second.records.flush(PATIENCE_SECONDS)
        await first.records.flush()
        await left_alone(made)
    expected = await alone(redis_url, prompt, n=n, max_tokens=length, sampling=Sampling(logprobs=1))
    assert again.tokens == expected
    tokens = [token for line in expected.values() for token in line]
    assert sorted(one.token for one in again.logprobs if one) == sorted(tokens)


async def test_a_finished_request_is_answered_from_its_record(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made)
        await ready(made, first, second)
        job = made.job([1, 2, 3], n=2, sampling=Sampling(logprobs=1))
        heard = Heard()
        await first.begin(job, heard, first.open(job, "key"))
        await first.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
        await made.kill("d")
        await made.kill("p")
        again = await second.resume(job)
        assert (again.tokens, again.finish) == (heard.tokens, heard.finish)
        assert sorted(map(repr, again.logprobs)) == sorted(map(repr, heard.logprobs))


async def test_a_stopped_sequence_stops_at_the_same_token_again(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job = made.job([5, 6, 7], n=2, max_tokens=5000)
        heard = Heard(stop_after=30)
        carrying = first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(0, ())) >= 12)
        await first.die()
        again = Heard(stop_after=30)
        await second.begin(job, again, await second.records.take("t", job.id))
        assert carrying.cancelled()
        assert {len(line) for line in again.tokens.values()} == {30}
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)


async def test_when_worker_and_gateway_die_it_is_computed_again(redis_url: str) -> None:
    prompt = list(range(30))
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job = made.job(prompt, n=2, max_tokens=60)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(1, ())) > 10)
        await asyncio.gather(first.die(), made.kill("d"))
        resuming = asyncio.ensure_future(second.resume(job, 10, 10))
        await made.start("d", "decode", **DECODE)
        again = await resuming
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
    assert again.tokens == await alone(redis_url, prompt, n=2, max_tokens=60)


class Inexact(SyntheticBackend):
    """As a device whose steps and prefills do not agree to the bit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**SHAPE, **options})
        self.info = msgspec.structs.replace(self.info, continuation="equivalent")


@pytest.mark.parametrize("told", [(), (3,)])
async def test_what_cannot_come_out_the_same_is_not_computed_again(
    redis_url: str, told: tuple[int, ...]
) -> None:
    async with gateways(redis_url) as (made, first, second):
        await made.start("b", "both", backend=Inexact(**SLOW))
        await first.knows(1)
        await second.knows(1)
        job = made.job([1, 2, 3], max_tokens=60)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 10)
        await asyncio.gather(first.die(), made.kill("b"))
        resuming = asyncio.ensure_future(second.resume(job, *told))
        await made.start("b", "both", backend=Inexact())
        if told:
            with pytest.raises(ContinuationLost):
                await resuming
        else:
            assert len((await resuming).tokens[0]) == 60
            await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)


async def test_sequences_that_went_apart_are_found_where_they_are(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await made.start("d2", "decode", **DECODE, **SLOW)
        await ready(made, first, second)
        await made.until(lambda: len(first.fleet.snapshot().pairs) == 2)
        job = made.job([1, 2], n=3, max_tokens=100)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(2, ())) > 5)
        (held,) = [held for name in ("d", "d2") for held in made.hosts[name]._requests._book]
        for name in ("d", "d2"):
            requests = made.hosts[name]._requests
            if list(requests._book):
                requests.lost(held.running[1], "preempted", "on purpose")
        await made.until(lambda: len(heard.tokens[1]) > 15)
        await first.die()
        again = await second.resume(job)
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
    assert again.tokens == await alone(redis_url, [1, 2], n=3, max_tokens=100)


async def test_a_key_that_is_sent_twice_makes_one_request(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job, other = (made.job([1, 2, 3], max_tokens=LASTING) for _ in range(2))
        heard = Heard()
        carrying = first.begin(job, heard, first.open(job, "key"))
        await made.until(lambda: heard.tokens)
        with pytest.raises(Repeated) as caught:
            await second.begin(other, Heard(), second.open(other, "key"))
        again = Heard()
        await second.begin(job, again, caught.value.claim)
        with pytest.raises(TakenOver):
            await carrying
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
    assert again.tokens == await alone(redis_url, [1, 2, 3], max_tokens=LASTING)


async def test_without_redis_a_client_waits_and_its_request_is_kept(redis_url: str) -> None:
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job = made.job([1, 2, 3], max_tokens=50)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: heard.tokens)
        await first.die()
        pipe = second.records._pipe
        pipe._ready.clear()
        with pytest.raises(QueueUnavailable):
            second.open(made.job([1]), "")
        pipe._ready.set()
        again = await second.resume(job)
        await second.records.flush(PATIENCE_SECONDS)
        await left_alone(made)
    assert len(again.tokens[0]) == 50


async def test_nothing_is_kept_beyond_the_lease(redis_url: str) -> None:
    async with gateways(redis_url, keep=0.3) as (made, first, _):
        await pair(made, **SLOW)
        await ready(made, first)
        job = made.job([1, 2, 3], n=2, max_tokens=3000)
        heard = Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(1, ())) > 5)
        await first.die()
        await left_alone(made)


async def test_a_worker_that_dies_after_it_was_adopted_from_costs_no_token(redis_url: str) -> None:
    prompt = list(range(40))
    async with gateways(redis_url) as (made, first, second):
        await pair(made, **SLOW)
        await ready(made, first, second)
        job, heard = made.job(prompt, max_tokens=300), Heard()
        first.begin(job, heard, first.open(job))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 20)
        await first.die()
        again = Heard()
        carrying = second.begin(job, again, await second.records.take(job.tenant, job.id))
        await made.until(lambda: len(again.tokens.get(0, ())) > 40)
        await made.kill("d")
        await made.start("d", "decode", **DECODE)
        await carrying
    assert again.tokens == await alone(redis_url, prompt, max_tokens=300)
