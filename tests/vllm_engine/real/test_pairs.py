"""vLLM on either side of a handoff: in float32 the text is that of torch alone, for 32 prompts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from backends.protocol import Sampling
from tests.engine.desk import clean
from tests.life.cluster import Cluster, Heard, cluster
from tests.support.prompts import prompts

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
TOKENS = 16
TOGETHER = 4
HOST = {"step_tokens": 1024}


async def texts(made: Cluster, **job: Any) -> list[list[int]]:
    """What becomes of all prompts, some of them at a time."""
    room = asyncio.Semaphore(TOGETHER)
    wishes = {"sampling": GREEDY, "max_tokens": TOKENS, "seconds": 600.0, **job}

    async def one(prompt: tuple[int, ...]) -> list[int]:
        heard = Heard()
        async with room:
            timeline = await made.carry(made.job(list(prompt), **wishes), heard)
        assert timeline.retries == 0
        return heard.tokens[0]

    return await asyncio.gather(*(one(prompt) for prompt in prompts()))


@pytest.fixture(scope="module")
def truth(partners: Any, redis_url: str) -> list[list[int]]:
    """The texts of torch alone."""

    async def alone() -> list[list[int]]:
        async with cluster(redis_url) as made:
            await made.start("b", "both", backend=partners["torch"], host=HOST)
            await made.until(lambda: made.fleet.snapshot().workers)
            return await texts(made)

    return asyncio.run(alone())


PARTNERS = ("torch", "onnxruntime", "llamacpp")
PAIRS = [f"{it} vllm" for it in PARTNERS] + [f"vllm {it}" for it in PARTNERS] + ["vllm vllm"]


@pytest.mark.parametrize("pair", PAIRS)
async def test_the_text_is_that_of_torch_alone(
    pair: str, truth: list[list[int]], partners: Any, vllm: Any, redis_url: str
) -> None:
    prefill, decode = pair.split()
    async with cluster(redis_url) as made:
        one = vllm["p"] if prefill == "vllm" else partners[prefill]
        other = vllm["d"] if decode == "vllm" else partners[decode]
        await made.start("p", "prefill", backend=one, host=HOST)
        await made.start("d", "decode", backend=other, host=HOST)
        await made.paired()
        assert await texts(made) == truth
        await clean(made, 10.0)


async def test_vllm_in_place_says_what_torch_does(
    truth: list[list[int]], vllm: Any, redis_url: str
) -> None:
    async with cluster(redis_url) as made:
        await made.start("b", "both", backend=vllm["d"], host=HOST)
        await made.until(lambda: made.fleet.snapshot().workers)
        assert await texts(made) == truth
        await clean(made, 10.0)


async def test_what_vllm_drops_for_lack_of_room_is_computed_again(
    partners: Any, vllm: Any, redis_url: str
) -> None:
    """Twelve sequences that are all taken, and then grow to more blocks than there are."""
    prompt, tokens, together = list(max(prompts(), key=len)), 130, 12
    info = vllm["d"].info
    taken = together * info.layout.blocks_for(len(prompt) + 1)
    grown = together * info.layout.blocks_for(len(prompt) + tokens)
    assert taken <= info.engine_blocks < grown
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", backend=partners["torch"], host=HOST)
        await made.start("d", "decode", backend=vllm["d"], host=HOST)
        await made.paired()
        heard = [Heard() for _ in range(together)]
        job = {"sampling": GREEDY, "max_tokens": tokens, "seconds": 900.0}
        await asyncio.gather(*(made.carry(made.job(prompt, **job), one) for one in heard))
        texts = [tuple(one.tokens[0]) for one in heard]
        assert {len(text) for text in texts} == {tokens}
        assert len(set(texts)) == 1
        await clean(made, 10.0)
