"""Whole requests through real sockets: queue, prefill, handoff, decode, and every way to fail."""

import asyncio
import random
from typing import Any

import pytest

from backends.protocol import Sampling
from gateway.errors import (
    BadRequest,
    DeadlineExceeded,
    Draining,
    NoSuchWorker,
    NoWorkers,
    WorkerFailed,
)
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster

SLOW = {"step_seconds": 0.005}


async def alone(url: str, prompt: list[int], **job: Any) -> dict[int, list[int]]:
    """What one undisturbed worker that does both says."""
    async with cluster(url) as made:
        await made.start("b", "both", **DECODE)
        await made.until(lambda: made.fleet.workers)
        heard = Heard()
        await made.carry(made.job(prompt, **job), heard)
        return heard.tokens


async def pair(made: Cluster, *, prefill: Any = None, decode: Any = None, **options: Any) -> None:
    await made.start("p", "prefill", host=prefill, **PREFILL, **options)
    await made.start("d", "decode", host=decode, **DECODE, **options)
    await made.paired()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 100, 511, 512, 513, 2000])
async def test_a_handoff_changes_no_token(redis_url: str, length: int) -> None:
    prompt = random.Random(length).choices(range(40000), k=length)
    async with cluster(redis_url) as made:
        await pair(made)
        heard = Heard()
        timeline = await made.carry(made.job(prompt, n=3), heard)
        await made.balanced()
    assert heard.tokens == await alone(redis_url, prompt, n=3)
    assert heard.finish == dict.fromkeys(range(3), "length")
    assert len({tuple(line) for line in heard.tokens.values()}) == 3
    assert timeline.decode_worker == "d"
    assert timeline.prefill is not None
    assert timeline.reserve is not None


async def test_sixty_four_requests_at_once_end_and_leave_nothing(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made)
        heards = [Heard() for _ in range(64)]
        prompts = [random.Random(i).choices(range(40000), k=1 + i * 3) for i in range(64)]
        jobs = [made.job(prompt, n=1 + i % 2) for i, prompt in enumerate(prompts)]
        async with asyncio.TaskGroup() as tasks:
            for job, heard in zip(jobs, heards, strict=True):
                tasks.create_task(made.carry(job, heard))
        assert all(len(line) == 20 for heard in heards for line in heard.tokens.values())
        await made.balanced()
        assert all(not worker.legs for worker in made.fleet.workers)


@pytest.mark.parametrize("fault", ["flip_bit@1", "missing_page@1", "swapped_layer@1", "drop@1:2"])
async def test_a_damaged_handoff_is_prefilled_again(redis_url: str, fault: str) -> None:
    prompt = list(range(100, 300))
    async with cluster(redis_url) as made:
        await pair(made, prefill={"faults": fault})
        heard = Heard()
        timeline = await made.carry(made.job(prompt, n=3), heard)
        assert timeline.retries == 1
        await made.balanced()
    assert heard.tokens == await alone(redis_url, prompt, n=3)


async def test_a_pair_that_always_damages_is_given_up_with_a_reason(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, prefill={"faults": "flip_bit@*"})
        with pytest.raises(WorkerFailed, match="handoff") as caught:
            await made.carry(made.job([1, 2, 3]), Heard())
        assert caught.value.phase == "handoff"
        await made.balanced()


async def test_a_dead_decode_worker_costs_no_token(redis_url: str) -> None:
    prompt = list(range(50))
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job(prompt, n=3, max_tokens=60), heard))
        await made.until(lambda: len(heard.tokens.get(2, ())) > 10)
        await made.kill("d")
        before = {index: list(line) for index, line in heard.tokens.items()}
        await made.start("d", "decode", **DECODE, **SLOW)
        timeline = await carrying
        await made.balanced()
    assert timeline.retries >= 1
    assert all(heard.tokens[index][: len(line)] == line for index, line in before.items())
    assert heard.tokens == await alone(redis_url, prompt, n=3, max_tokens=60)


async def test_a_dead_prefill_worker_costs_no_token(redis_url: str) -> None:
    prompt = list(range(400))
    slow = {"prefill_seconds_per_token": 0.005}
    async with cluster(redis_url) as made:
        await pair(made, **slow)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job(prompt), heard))
        prefill = made.hosts["p"]
        await made.until(lambda: prefill._requests.steps.waiting)
        await asyncio.sleep(0.5)  # somewhere inside the prefill, with layers on their way
        assert not heard.tokens
        await made.kill("p")
        await made.start("p", "prefill", **PREFILL)
        await carrying
        await made.balanced()
    assert heard.tokens == await alone(redis_url, prompt)


async def test_a_pool_that_runs_dry_preempts_and_goes_on(redis_url: str) -> None:
    prompt = list(range(64))
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", **PREFILL)
        await made.start("d", "decode", **DECODE, pool_tokens=16 * 16, **SLOW)
        await made.paired()
        heards = [Heard() for _ in range(3)]
        async with asyncio.TaskGroup() as tasks:
            for heard in heards:
                tasks.create_task(made.carry(made.job(prompt, max_tokens=80), heard))
        await made.balanced()
    expected = await alone(redis_url, prompt, max_tokens=80)
    assert [heard.tokens for heard in heards] == [expected] * 3


async def test_cancelling_at_any_moment_leaves_nothing(redis_url: str) -> None:
    dice = random.Random(5)
    async with cluster(redis_url) as made:
        await pair(made, step_seconds=0.001, prefill_seconds_per_token=0.00002)
        for _ in range(60):
            job = made.job(list(range(dice.randint(1, 400))), n=dice.randint(1, 3), max_tokens=50)
            carrying = asyncio.ensure_future(made.carry(job, Heard()))
            await asyncio.sleep(dice.choice([0, 0.001, 0.003, 0.01, 0.03]) * dice.random())
            carrying.cancel()
            await asyncio.wait([carrying])
        await made.balanced()
        heard = Heard()
        await made.carry(made.job([1, 2, 3]), heard)
        assert len(heard.tokens[0]) == 20


async def test_a_listener_that_has_seen_enough_ends_its_sequences(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        for enough in (1, 2, 9):
            heard = Heard(stop_after=enough)
            await made.carry(made.job([5, 6, 7], n=2, max_tokens=5000), heard)
            assert {len(line) for line in heard.tokens.values()} == {enough}
            await made.balanced()


async def test_one_token_needs_no_decode_worker(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", **PREFILL)
        await made.until(lambda: made.fleet.workers)
        heard = Heard()
        timeline = await made.carry(made.job([5, 6, 7], max_tokens=1), heard)
        assert len(heard.tokens[0]) == 1
        assert timeline.reserve is None
        await made.balanced()


async def test_logprobs_reach_the_listener_across_the_handoff(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made)
        heard = Heard()
        await made.carry(
            made.job([5, 6, 7], sampling=Sampling(logprobs=2), prompt_logprobs=1), heard
        )
        assert [one.token for one in heard.logprobs if one] == heard.tokens[0]
        assert [one.token for one in heard.prompt] == [6, 7]


async def test_a_deadline_names_the_phase_and_frees_everything(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, step_seconds=0.02)
        with pytest.raises(DeadlineExceeded, match="decoding"):
            await made.carry(made.job([1, 2], max_tokens=5000, seconds=2.0), Heard())
        await made.balanced()


async def test_without_workers_a_request_fails_in_time(redis_url: str) -> None:
    async with cluster(redis_url, worker_wait_seconds=0.1) as made:
        with pytest.raises(NoWorkers):
            await made.carry(made.job([1, 2]), Heard())


async def test_a_prompt_that_no_pool_can_hold_is_the_clients_fault(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, pool_tokens=256)
        with pytest.raises(BadRequest, match="pool"):
            await made.carry(made.job(list(range(300))), Heard())


async def test_unlike_models_are_never_paired(redis_url: str) -> None:
    async with cluster(redis_url, worker_wait_seconds=0.5) as made:
        await made.start("p", "prefill", **PREFILL, model="one")
        await made.start("d", "decode", **DECODE, model="other")
        await made.until(lambda: made.fleet.pairs)
        ((_, _, met),) = made.fleet.pairs
        assert "model" in met.refusal
        with pytest.raises(NoWorkers):
            await made.carry(made.job([1, 2]), Heard())


async def test_a_paused_sequence_waits_and_the_others_go_on(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, step_seconds=0.002)
        heard = Heard()
        job = made.job([1, 2], n=2, max_tokens=200)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await made.until(lambda: len(heard.tokens.get(1, ())) > 5)
        made.relay.pause(job, 0, True)
        await made.until(lambda: heard.finish.get(1))
        assert len(heard.tokens[0]) < 200
        made.relay.pause(job, 0, False)
        await carrying
        assert len(heard.tokens[0]) == 200


async def test_a_draining_worker_finishes_and_takes_no_more(redis_url: str) -> None:
    async with cluster(redis_url, worker_wait_seconds=0.5) as made:
        await pair(made, **SLOW)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job([1, 2], max_tokens=50), heard))
        await heard.first.wait()
        await made.fleet.drain("d")
        await carrying
        assert len(heard.tokens[0]) == 50
        await made.until(lambda: made.fleet.worker("d") is None)
        with pytest.raises(NoWorkers):
            await made.carry(made.job([1, 2]), Heard())


@pytest.mark.parametrize("n", [1, 3])
async def test_what_a_drained_decode_worker_cannot_finish_goes_on_elsewhere(
    redis_url: str, n: int
) -> None:
    async with cluster(redis_url, max_retries=0) as made:
        await pair(made, decode={"drain_seconds": 0.1}, **SLOW)
        heard = Heard()
        job = made.job(list(range(50)), n=n, max_tokens=1000)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await made.until(lambda: len(heard.tokens.get(n - 1, ())) > 5)
        await made.start("d2", "decode", **DECODE)
        await made.paired(2)
        assert not heard.finish
        await made.fleet.drain("d")
        await made.until(lambda: made.fleet.worker("d") is None)
        timeline = await carrying
        assert (timeline.retries, timeline.decode_worker) == (0, "d2")
        await made.balanced()
    assert heard.tokens == await alone(redis_url, list(range(50)), n=n, max_tokens=1000)


async def test_what_a_drained_prefill_worker_cannot_finish_goes_on_elsewhere(
    redis_url: str,
) -> None:
    prompt = list(range(400))
    slow = {"prefill_seconds_per_token": 0.01}
    async with cluster(redis_url, max_retries=0) as made:
        await pair(made, prefill={"drain_seconds": 0.1, "step_tokens": 64}, **slow)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job(prompt), heard))
        await made.until(lambda: made.hosts["p"]._requests.steps.waiting)
        await made.start("p2", "prefill", **PREFILL)
        await made.paired(2)
        await made.fleet.drain("p")
        timeline = await carrying
        assert (timeline.retries, timeline.prefill_worker) == (0, "p2")
        await made.balanced()
    assert heard.tokens == await alone(redis_url, prompt)


async def test_a_landing_that_nothing_has_reached_is_given_back(redis_url: str) -> None:
    prompt = list(range(400))
    async with cluster(redis_url, max_retries=0) as made:
        slow = {"prefill_seconds_per_token": 0.007}
        await made.start("p", "prefill", **PREFILL, **slow)
        await made.start("d", "decode", host={"drain_seconds": 0.1}, **DECODE)
        await made.paired()
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job(prompt), heard))
        await made.until(lambda: made.hosts["d"]._requests.landings)
        await made.start("d2", "decode", **DECODE)
        await made.paired(2)
        await made.fleet.drain("d")
        timeline = await carrying
        assert (timeline.retries, timeline.decode_worker) == (0, "d2")
        await made.balanced()
    assert heard.tokens == await alone(redis_url, prompt)


async def test_a_worker_that_is_not_there_cannot_be_drained(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await made.start("b", "both", host={"protocol": 2}, **DECODE)
        await made.until(lambda: made.fleet.workers)
        with pytest.raises(NoSuchWorker, match="no worker `x` is connected; there are: b"):
            await made.fleet.drain("x")
        with pytest.raises(BadRequest, match="SIGTERM"):
            await made.fleet.drain("b")
        assert not made.hosts["b"].draining.is_set()
        assert made.fleet.workers


async def test_a_draining_relay_carries_what_runs_and_comes_until_it_gives_up(
    redis_url: str,
) -> None:
    async with cluster(redis_url) as made:
        await pair(made, **SLOW)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job([1, 2], max_tokens=5000), heard))
        await heard.first.wait()
        made.relay.drain()
        await made.carry(made.job([3, 4]), Heard())
        assert not carrying.done()
        made.relay.give_up()
        with pytest.raises(Draining):
            await carrying
        with pytest.raises(Draining):
            await made.carry(made.job([3, 4]), Heard())
        await made.balanced()
