"""KV from a GPU decoded on the CPU, and the other way round: the text is that of the CPU alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from backends.emulation import EmulationBackend
from tests.emulation.desk import Desk, bundled_model
from tests.life.cluster import DECODE, PREFILL, Cluster, cluster
from tests.life.test_real_model import GREEDY, WARM, Kept, prompts, say
from tests.support.margin import assert_same_or_near_tie

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def make(device: str, **options: object) -> EmulationBackend:
    return EmulationBackend(
        model=bundled_model(), dtype="float32", device=device, pool_tokens=8192, **options
    )


@pytest.fixture(scope="module")
def alone() -> Iterator[Desk]:
    backend = make("cpu", **DECODE)
    yield Desk(backend)
    backend.close()


@pytest.fixture(scope="module", params=["cuda-to-cpu", "cpu-to-cuda", "cuda-to-cuda"])
def engines(request: pytest.FixtureRequest) -> Iterator[dict[str, EmulationBackend]]:
    source, target = request.param.split("-to-")
    made = {"p": make(source, **PREFILL), "d": make(target, **DECODE)}
    yield made
    for each in made.values():
        each.close()


@pytest.fixture
async def pair(redis_url: str, engines: dict[str, EmulationBackend]) -> AsyncIterator[Cluster]:
    async with cluster(redis_url) as made:
        for name, role in (("p", "prefill"), ("d", "decode")):
            await made.start(name, role, backend=Kept(engines[name]), host={"step_tokens": 512})
        await made.paired()
        yield made


@pytest.mark.parametrize("prompt", prompts()[::4], ids=len)
@pytest.mark.parametrize("temperature", [0, 1])
async def test_the_text_is_that_of_the_cpu_alone(
    pair: Cluster, alone: Desk, prompt: list[int], temperature: int
) -> None:
    """Float32 on both, which agree as two orders of additions do (`margin.py`)."""
    sampling = WARM if temperature else GREEDY
    heard = (await say(pair, prompt, sampling=sampling, max_tokens=16))[0]
    assert_same_or_near_tie(
        heard,
        alone.text(prompt, 16, sampling=sampling, seed=7),
        prompt=prompt,
        logits_after=alone.logprobs_after,
        temperature=float(temperature),
        seed=7,
    )
    await pair.balanced()
