"""An engine on either side of a handoff, or on both, or alone: the text is always the same."""

from typing import Any

import pytest

from tests.engine.desk import clean, engine, start_pair, truth
from tests.life.cluster import PREFILL, Heard, cluster

PAIRS = ("engine stepped", "stepped engine", "engine engine", "engine", "stepped")
PROMPT = list(range(5, 138))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("n", [1, 3])
async def test_the_text_is_the_same_whatever_kinds_carry_it(
    redis_url: str, pair: str, n: int
) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, pair)
        for length in (len(PROMPT), 48, 1):
            heard = Heard()
            timeline = await made.carry(made.job(PROMPT[:length], n=n), heard)
            assert timeline.retries == 0
            assert heard.tokens == truth(PROMPT[:length], n, 20)
            assert heard.finish == dict.fromkeys(range(n), "length")
        await clean(made)


@pytest.mark.parametrize("options", [{"recomputed": 1}, {"recomputed": 40}, {"chunk_tokens": 17}])
async def test_an_engine_may_compute_the_end_of_a_prefix_again(
    redis_url: str, options: dict[str, Any]
) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", **options)
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT), heard)
        assert (timeline.retries, heard.tokens) == (0, truth(PROMPT, 1, 20))
        await clean(made)


async def test_the_arena_may_be_cut_otherwise_than_the_others_pool(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", backend=engine(**PREFILL))
        await made.start("d", "decode", backend=engine(block_tokens=16))
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT, n=2), heard)
        assert (timeline.retries, heard.tokens) == (0, truth(PROMPT, 2, 20))
        await clean(made)


async def test_a_full_engine_computes_again_what_it_had_to_drop(redis_url: str) -> None:
    """Six sequences that grow to twelve blocks each, in a memory of forty."""
    async with cluster(redis_url) as made:
        await made.start("p", "prefill")
        small = engine(pool_tokens=640)
        await made.start("d", "decode", backend=small)
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT[:90], n=6, max_tokens=90), heard)
        assert (timeline.retries, heard.tokens) == (0, truth(PROMPT[:90], 6, 90))
        assert small.preempted
        await clean(made)
