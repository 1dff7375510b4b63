"""The real model in float32 through queue, prefill, handoff and decode, beside one worker alone."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from backends.emulation import EmulationBackend
from backends.protocol import Sampling
from tests.emulation.desk import Desk, bundled_model, engine
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster
from tests.support.margin import assert_same_or_near_tie

pytestmark = pytest.mark.slow

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
WARM = Sampling(temperature=1.0, ignore_eos=True)
CHUNK = {"step_tokens": 512}


class Kept:
    """A backend that outlives the worker that hosts it."""

    def __init__(self, backend: EmulationBackend) -> None:
        self.info, self.pool, self.step = backend.info, backend.pool, backend.step
        self.ingest, self.copy_blocks = backend.ingest, backend.copy_blocks

    def close(self) -> None: ...


def make(**options: object) -> EmulationBackend:
    return engine(model=bundled_model(), dtype="float32", threads=1, pool_tokens=8192, **options)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, EmulationBackend]]:
    made = {"p": make(**PREFILL), "d": make(**DECODE), "b": make(**DECODE)}
    yield made
    for each in made.values():
        each.close()


@pytest.fixture
async def pair(redis_url: str, engines: dict[str, EmulationBackend]) -> AsyncIterator[Cluster]:
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", backend=Kept(engines["p"]), host=CHUNK)
        await made.start("d", "decode", backend=Kept(engines["d"]), host=CHUNK)
        await made.paired()
        yield made


@pytest.fixture
async def alone(redis_url: str, engines: dict[str, EmulationBackend]) -> AsyncIterator[Cluster]:
    async with cluster(redis_url) as made:
        await made.start("b", "both", backend=Kept(engines["b"]), host=CHUNK)
        await made.until(lambda: made.fleet.workers)
        yield made


async def say(where: Cluster, prompt: list[int], **job: object) -> dict[int, list[int]]:
    heard = Heard()
    await where.carry(where.job(prompt, seconds=300.0, **job), heard)
    return heard.tokens


def prompts() -> list[list[int]]:
    dice = np.random.default_rng(7)
    lengths = np.geomspace(1, 2000, 32).round().astype(int) + np.arange(32) % 2
    return [dice.integers(3, 49000, int(length)).tolist() for length in lengths]


@pytest.mark.parametrize("prompt", prompts(), ids=len)
async def test_greedy_text_through_a_handoff_is_that_of_one_engine(
    pair: Cluster, alone: Cluster, prompt: list[int]
) -> None:
    job = {"sampling": GREEDY, "max_tokens": 8}
    assert await say(pair, prompt, **job) == await say(alone, prompt, **job)
    await pair.balanced()


async def test_seeded_text_is_the_same_alone_and_among_sixteen(
    pair: Cluster, alone: Cluster, engines: dict[str, EmulationBackend]
) -> None:
    some = [prompt for prompt in prompts() if 8 <= len(prompt) <= 60][:6]
    job = {"sampling": WARM, "max_tokens": 8}
    expected = [await say(alone, prompt, **job) for prompt in some]
    crowd = [say(pair, prompt, **job) for prompt in (some * 3)[:16]]
    together = await asyncio.gather(*crowd)
    desk = Desk(engines["b"])
    for number, heard in enumerate(together):
        assert_same_or_near_tie(
            heard[0],
            expected[number % len(some)][0],
            prompt=some[number % len(some)],
            logits_after=desk.logprobs_after,
            temperature=1.0,
            seed=7,
        )
    await pair.balanced()


async def test_three_sequences_share_one_handoff_and_repeat_with_their_seed(pair: Cluster) -> None:
    prompt = prompts()[16]
    job = {"sampling": WARM, "max_tokens": 8, "n": 3}
    before = pair.hosts["d"]._requests.landings._count
    first = await say(pair, prompt, **job)
    assert pair.hosts["d"]._requests.landings._count == before + 1
    assert len({tuple(line) for line in first.values()}) == 3
    assert await say(pair, prompt, **job) == first


def families() -> list[list[int]]:
    """Prompts that share beginnings of unlike lengths, each of them a few times."""
    dice = np.random.default_rng(11)
    roots = [dice.integers(3, 49000, length).tolist() for length in (33, 70, 161, 400)]
    tails = (2, 9, 31, 64)
    return [
        [*root[: len(root) - cut], *dice.integers(3, 49000, tail).tolist()]
        for cut in (0, 7)
        for root in roots
        for tail in tails
    ]


async def test_text_is_the_same_with_kv_that_was_there_already(
    pair: Cluster, redis_url: str, engines: dict[str, EmulationBackend]
) -> None:
    """Asked twice: the second time nearly all of each prompt is there, on both sides."""
    asked = families()
    jobs = [{"sampling": GREEDY, "max_tokens": 6}, {"sampling": WARM, "max_tokens": 6}]
    async with cluster(redis_url) as made:
        await made.start("b", "both", backend=Kept(engines["b"]), host={**CHUNK, "reuse": "off"})
        await made.until(lambda: made.fleet.workers)
        texts = [(await say(made, prompt, **jobs[i % 2]))[0] for i, prompt in enumerate(asked)]
    cached = present = 0
    desk = Desk(engines["b"])
    for round_ in range(2):
        for i, prompt in enumerate(asked):
            heard = Heard()
            timeline = await pair.carry(pair.job(prompt, seconds=300.0, **jobs[i % 2]), heard)
            cached += timeline.cached_tokens
            present += timeline.present_tokens
            assert timeline.retries == 0
            if round_:
                assert timeline.cached_tokens == (len(prompt) - 2) // 32 * 32
                assert timeline.present_tokens == (len(prompt) - 1) // 16 * 16
            assert_same_or_near_tie(
                heard.tokens[0],
                texts[i],
                prompt=prompt,
                logits_after=desk.logprobs_after,
                temperature=float(i % 2),
                seed=7,
            )
    assert cached > 5000
    assert present > 5000
    await pair.balanced()
