"""A context and a generation server behind the queue: what they are asked, and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from backends.api import BackendMisconfigured, DecodeJob, Sampling, Sequence
from backends.tensorrt_llm.served import TensorRTLLMServed
from tests.life.cluster import Heard, cluster
from tests.support.patience import PATIENCE_SECONDS
from tests.trtllm.play import write_model
from tests.trtllm.serve import EXCHANGES, FakeServe, filled, serving
from tests.vllm_engine.test_served import Told

PROMPT = [40, 41, 42, 43, 44]
TEXT = [91, 92, 93, 2]
WISH = Sampling(temperature=0.7, top_p=0.9, top_k=5, presence_penalty=0.5)


def construct(
    folder: Path, decode: FakeServe, prefill: FakeServe | None, **options: Any
) -> TensorRTLLMServed:
    given = {
        "model": str(write_model(folder)),
        "decode": decode.address,
        "prefill": prefill.address if prefill is not None else "",
        "silence_seconds": 10.0,
        **options,
    }
    return TensorRTLLMServed(**given)


@asynccontextmanager
async def backend(folder: Path, decode: FakeServe, prefill: FakeServe | None, **options: Any):
    made = await asyncio.to_thread(lambda: construct(folder, decode, prefill, **options))
    told = Told()
    made.start(told)
    try:
        yield made, told
    finally:
        await asyncio.to_thread(made.close)


@asynccontextmanager
async def pair(folder: Path, release: str = "1.3", **options: Any) -> AsyncIterator[Any]:
    async with serving(release) as context, serving(release) as generation:
        share = {} if release == "1.3" else {"share_prefixes": True}
        async with backend(folder, generation, context, **share, **options) as (made, told):
            yield made, told, context, generation


def job(name: str = "j", *, generated: Any = (), sampling: Sampling = WISH) -> DecodeJob:
    sequence = Sequence(prompt=PROMPT, generated=list(generated), sampling=sampling, seed=3)
    return DecodeJob(name=name, sequence=sequence, max_tokens=8, salt=b"\x0a")


async def text(made: Any, told: Told, it: DecodeJob) -> list[int]:
    made.decode(it)
    await told.until(told.end(it.name))
    assert not told.errors, told.errors
    return told.text(it.name)


async def test_both_servers_are_asked_what_is_written_down(tmp_path: Path) -> None:
    async with pair(tmp_path) as (made, told, context, generation):
        assert await text(made, told, job()) == TEXT
        assert told.done["j"][1] == 4
    [first], [second] = context.asked, generation.asked
    number = first["disaggregated_params"]["disagg_request_id"]
    assert 1 << 40 <= number < 1 << 63
    for asked, name in ((first, "context"), (second, "generation")):
        assert asked.pop("cache_salt") == "0a"
        assert asked == filled(EXCHANGES[name]["request"], number)


async def test_older_servers_are_asked_for_no_more_than_they_take(tmp_path: Path) -> None:
    async with pair(tmp_path, "1.2") as (made, told, context, generation):
        assert await text(made, told, job()) == TEXT
    assert context.asked[0]["disaggregated_params"] == {"request_type": "context_only"}
    assert "cache_salt" not in generation.asked[0]


async def test_a_first_token_that_is_told_again_is_told_once(tmp_path: Path) -> None:
    async with pair(tmp_path) as (made, told, _, generation):
        generation.generation = "generation that tells the first token again"
        assert await text(made, told, job()) == TEXT


async def test_an_end_right_after_the_prompt_needs_no_second_server(tmp_path: Path) -> None:
    async with pair(tmp_path) as (made, told, context, generation):
        context.context = "context that ends"
        assert await text(made, told, job()) == [2]
        assert generation.asked == []


async def test_what_is_generated_already_is_part_of_the_prompt(tmp_path: Path) -> None:
    async with pair(tmp_path) as (made, told, context, generation):
        await text(made, told, job(generated=[7, 8]))
    for [asked] in (context.asked, generation.asked):
        assert asked["prompt"] == [*PROMPT, 7, 8]
        assert (asked["max_tokens"], asked["prompt_ignore_length"]) == (6, 5)


async def test_greedy_leaves_one_token_to_choose_from(tmp_path: Path) -> None:
    async with pair(tmp_path) as (made, told, context, _):
        await text(made, told, job(sampling=Sampling(temperature=0.0, ignore_eos=True)))
    [asked] = context.asked
    assert (asked["top_k"], asked["stop_token_ids"], asked["ignore_eos"]) == (1, [], True)
    assert "temperature" not in asked


@pytest.mark.parametrize("server", ["context", "generation"])
async def test_an_abort_closes_the_connection_and_others_go_on(tmp_path: Path, server: str) -> None:
    async with pair(tmp_path) as (made, told, context, generation):
        slow = context if server == "context" else generation
        slow.hold = asyncio.Event()
        made.decode(job("gone"))
        while not slow.asked:
            await asyncio.sleep(0.002)
        made.abort("gone")
        await told.until(told.end("gone"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await slow.left.acquire()
        slow.hold = None
        assert await text(made, told, job("stays")) == TEXT


@pytest.mark.parametrize(
    ("context", "why"),
    [("refusal", "answered 400: .*max_num_tokens"), ("context without a transceiver", "no KV to")],
)
async def test_what_goes_wrong_is_said_and_costs_no_other_its_answer(
    tmp_path: Path, context: str, why: str
) -> None:
    async with pair(tmp_path) as (made, told, first, _):
        first.context = context
        made.decode(job())
        await told.until(told.end("j"))
        with pytest.raises(Exception, match=why):
            raise told.errors.pop("j")
        first.context = "context"
        assert await text(made, told, job("next")) == TEXT


@pytest.mark.parametrize(
    ("lacks", "options", "why"),
    [
        ({"cache_salt"}, {}, "share_prefixes: the servers keep no tenant's prompts apart"),
        ({"detokenize"}, {}, "do not take detokenize"),
        ({"disaggregated_params"}, {}, "do not take disaggregated_params"),
        (set(), {"served_model": "large"}, "served_model: .* serves tiny"),
        (set(), {"capacity_tokens": 0}, "capacity_tokens"),
    ],
)
async def test_servers_that_do_not_fit_are_refused_as_the_worker_starts(
    tmp_path: Path, lacks: set[str], options: dict[str, Any], why: str
) -> None:
    async with serving() as context, serving() as generation:
        context.lacks = lacks
        with pytest.raises(BackendMisconfigured, match=why):
            async with backend(tmp_path, generation, context, **options):
                pass


async def test_wishes_that_they_have_no_field_for_are_not_honoured(tmp_path: Path) -> None:
    async with serving() as generation:
        generation.lacks = {"prompt_ignore_length", "min_p"}
        async with backend(tmp_path, generation, None) as (made, told):
            assert not made.info.sampling & {"presence_penalty", "frequency_penalty", "min_p"}
            assert {"temperature", "logit_bias"} <= made.info.sampling
            generation.generation = "generation that tells the first token again"
            assert await text(made, told, job()) == TEXT
            assert "disaggregated_params" not in generation.asked[0]


async def test_the_pair_serves_behind_the_queue(redis_url: str, tmp_path: Path) -> None:
    async with serving() as context, serving() as generation, cluster(redis_url) as site:
        made = await asyncio.to_thread(lambda: construct(tmp_path, generation, context))
        await site.start("b", "both", backend=made)
        await site.until(lambda: site.fleet.snapshot().workers)
        heard = Heard()
        await site.carry(site.job(PROMPT, n=2, sampling=WISH, max_tokens=8), heard)
        assert heard.tokens == {0: TEXT, 1: TEXT}
        assert heard.finish == {0: "stop", 1: "stop"}
        assert (len(context.asked), len(generation.asked)) == (2, 2)
        await site.balanced()
