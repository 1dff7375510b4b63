"""Moments at which a request, a worker or a client could be forgotten."""

import asyncio
from typing import Any

import numpy as np
import pytest

from backends.api import Output, Row, Sampled
from backends.emulation.synthetic import SyntheticBackend
from backends.protocol import Failed
from gateway.errors import BadRequest
from gateway.life.states import State
from tests.life.cluster import DECODE, PREFILL, SHAPE, Cluster, Heard, cluster
from tests.support.patience import LONG_SECONDS

SLOW = {"step_seconds": 0.005}


async def pair(made: Cluster, **options: Any) -> None:
    await made.start("p", "prefill", **PREFILL, **options)
    await made.start("d", "decode", **DECODE, **options)
    await made.paired()


class Ending(SyntheticBackend):
    """Every token ends its sequence; no layer is reported before the step is over."""

    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        return [Output(tuple(Sampled(9) for _ in row.sequences)) for row in batch]


async def test_a_landing_is_freed_at_once_when_the_first_token_is_the_last(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        ending = Ending(**SHAPE, **PREFILL, end_tokens=(9,))
        await made.start("p", "prefill", backend=ending)
        await made.start("d", "decode", **DECODE)
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job([1, 2, 3], n=2), heard)
        assert heard.finish == {0: "stop", 1: "stop"}
        assert timeline.retries == 0
        await made.balanced()


class Strange(SyntheticBackend):
    """Its third step with a token to choose answers with something else."""

    strange: Any = None
    steps = 0

    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        outputs = super().step(batch, ready)
        self.steps += any(output.sampled for output in outputs)
        if self.steps != 3:
            return outputs
        return [Output(tuple(Sampled(self.strange) for _ in it.sampled)) for it in outputs]


@pytest.mark.parametrize("strange", [np.int64(9), -1, 1 << 40, None], ids=repr)
async def test_what_is_no_token_fails_its_step_and_not_the_connection(
    redis_url: str, strange: object
) -> None:
    async with cluster(redis_url) as made:
        backend = Strange(**SHAPE, **DECODE)
        backend.strange = strange
        await made.start("p", "prefill", **PREFILL)
        await made.start("d", "decode", backend=backend)
        await made.paired()
        heard, worker = Heard(), made.fleet.worker("d")
        await made.carry(made.job([1, 2, 3], max_tokens=8), heard)
        assert len(heard.tokens[0]) == 8
        assert set(heard.tokens[0]) <= set(range(backend.info.vocabulary))
        assert backend.steps > 3
        assert made.fleet.worker("d") is worker
        await made.balanced()


async def test_a_preemption_while_the_client_leaves_costs_nobody_else(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job([1, 2], max_tokens=500), heard))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 2)
        worker = made.fleet.worker("d")
        assert worker is not None
        handle = next(iter(worker.legs))
        preempted = Failed(
            handle=handle, phase="decode", code="preempted", detail="", retry=True, indexes=(0,)
        )
        carrying.cancel()
        await asyncio.sleep(0)
        if handle in worker.legs:
            worker.legs[handle].heard(worker, preempted)
        await asyncio.wait([carrying])
        assert carrying.cancelled()
        await made.balanced()


async def test_a_sequence_given_up_while_no_worker_is_there_goes_on_once(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        heard = Heard()
        job = made.job([1, 2], n=2, max_tokens=400)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await made.until(lambda: len(heard.tokens.get(1, ())) > 4)
        made.hosts["d"].drain()
        await made.until(lambda: all(view.draining for view in made.fleet.snapshot().workers[1:]))
        requests = made.hosts["d"]._requests
        (held,) = requests._book
        requests.lost(held.running[0], "preempted", "on purpose")
        await asyncio.sleep(0.05)
        await made.kill("d")
        await made.start("d", "decode", **DECODE)
        await carrying
        assert {len(line) for line in heard.tokens.values()} == {400}
        assert made.hosts["d"]._requests.landings._count == 2
        await made.balanced()


async def test_two_requests_of_one_name_are_paused_apart(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        jobs = [made.job([1, 2], max_tokens=200, id="chosen by the client") for _ in range(2)]
        heards = [Heard(), Heard()]
        carrying = [
            asyncio.ensure_future(made.carry(job, heard))
            for job, heard in zip(jobs, heards, strict=True)
        ]
        await made.until(lambda: all(len(heard.tokens.get(0, ())) > 2 for heard in heards))
        assert made.relay.running == 2
        made.relay.pause(jobs[0], 0, True)
        await carrying[1]
        assert len(heards[0].tokens[0]) < 200
        assert made.relay.running == 1
        made.relay.pause(jobs[0], 0, False)
        await carrying[0]


async def test_a_paused_sequence_stays_paused_when_its_worker_dies(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        heard = Heard()
        job = made.job([1, 2], max_tokens=400)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 2)
        made.relay.pause(job, 0, True)
        await made.kill("d")
        await made.start("d", "decode", **DECODE)
        requests = made.hosts["d"]._requests
        await made.until(lambda: any(held.running for held in requests._book))
        before = len(heard.tokens[0])
        await asyncio.sleep(0.1)
        assert len(heard.tokens[0]) <= before + 3
        made.relay.pause(job, 0, False)
        await carrying
        assert len(heard.tokens[0]) == 400


async def test_a_prompt_too_long_for_all_decode_pools_is_the_clients_fault(redis_url: str) -> None:
    async with cluster(redis_url, worker_wait_seconds=0.5) as made:
        await made.start("p", "prefill", **PREFILL)
        await made.start("d", "decode", **DECODE, pool_tokens=256)
        await made.paired()
        with pytest.raises(BadRequest, match="pool of d"):
            await made.carry(made.job(list(range(300))), Heard())


@pytest.mark.parametrize("end", [State.DONE, State.FAILED, State.CANCELLED, State.EXPIRED])
async def test_every_life_ends_as_its_request_did(redis_url: str, end: State) -> None:
    async with cluster(redis_url, max_retries=0, worker_wait_seconds=0.05) as made:
        await pair(made, **SLOW)
        heard = Heard()
        seconds = 2.0 if end is State.EXPIRED else LONG_SECONDS
        length = 10 if end is State.DONE else 5000
        job = made.job([1, 2], n=2, max_tokens=length, seconds=seconds)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await made.until(lambda: len(heard.tokens.get(1, ())) > 2)
        run = made.relay._runs[job]
        assert [life.state for life in run.lives] == [State.DECODING]
        if end is State.FAILED:
            await made.kill("d")
        if end is State.CANCELLED:
            carrying.cancel()
        await asyncio.wait([carrying])
        assert [life.state for life in run.lives] == [end]
        assert made.relay.running == 0
