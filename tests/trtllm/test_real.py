"""The same as on the stand-in, on the real TensorRT-LLM: `make test-trtllm-gpu MODEL=folder`.

What leaves the engine is compared with the KV that the torch engine computes from the same
checkpoint: order of heads and tokens, RoPE pairing and values are what no stand-in can know.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from backends.emulation import EmulationBackend
from tests.emulation.desk import Desk as Reference
from tests.emulation.desk import Line
from tests.trtllm.desk import Heard
from tests.trtllm.play import until

MODEL = os.environ.get("BATON_TRTLLM_MODEL", "")

pytestmark = pytest.mark.skipif(
    not MODEL or find_spec("tensorrt_llm") is None,
    reason="needs TensorRT-LLM, a GPU and BATON_TRTLLM_MODEL (a folder in Hugging Face form)",
)

LONG = list(range(100, 400))
ALIKE = 0.99
"""Least cosine between the two engines' heads of a token, in bfloat16 or float16."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    from backends.tensorrt_llm.engine import TensorRTLLM

    made = TensorRTLLM(
        model=MODEL,
        pool_tokens=4096,
        chunk_tokens=128,
        context_tokens=1024,
        kv_cache={"free_gpu_memory_fraction": 0.3},
    )
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def desk(engine: Any) -> Any:
    from tests.trtllm.desk import Desk

    return Desk(engine, gates=None)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(EmulationBackend(model=MODEL, dtype="float32", pool_tokens=2048, rope="half"))


def numbers(info: Any, pool: Any, blocks: Any, count: int) -> np.ndarray:
    """The KV of a prefix as [layer, kv, token, head, dim] in float32."""
    layout = info.layout
    raw = np.frombuffer(pool, np.uint32 if layout.item_bytes == 4 else np.uint16)
    sizes = layout.sizes(info.pool_blocks)
    shaped = raw.reshape(tuple(sizes.values()))
    axes = [list(sizes).index(it) for it in ("layer", "kv", "block", "token", "head", "dim")]
    cut = shaped.transpose(axes)[:, :, list(blocks)]
    whole = cut.reshape(*cut.shape[:2], -1, *cut.shape[4:])[:, :, :count]
    if layout.dtype == "bfloat16":
        return (whole.astype(np.uint32) << 16).view(np.float32)
    return whole.view(np.float16 if layout.dtype == "float16" else np.float32).astype(np.float32)


def check(desk: Any, reference: Reference, tokens: list[int], job: Any) -> None:
    line = Line(tokens)
    reference.prefill(line)
    theirs = numbers(reference.backend.info, reference.backend.pool, line.blocks, len(tokens))
    reference.release(line)
    ours = numbers(desk.engine.info, desk.engine.pool, job.blocks, len(tokens))
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    alike = (ours * theirs).sum(axis=-1) / np.maximum(norms, 1e-9)
    worst = np.unravel_index(alike.argmin(), alike.shape)
    assert alike.min() > ALIKE, f"layer, K or V, token, head {worst}: {alike.min():.3f}"


def done(desk: Any, tokens: list[int], **more: Any) -> Any:
    job = desk.job(tokens, **more)
    desk.ended(job, seconds=60)
    assert desk.heard.kinds(job.name)[-2:] == ["prefilled", "ended"], desk.heard.of(job.name)
    return job


@pytest.mark.parametrize("length", [1, 31, 32, 33, 129, 300])
def test_kv_is_that_of_the_reference(desk: Any, reference: Reference, length: int) -> None:
    job = done(desk, LONG[:length])
    ready = [rest for kind, *rest in desk.heard.of(job.name) if kind == "ready"]
    assert [start for start, _ in ready] == [0, *(end for _, end in ready[:-1])]
    assert ready[-1][1] == length
    check(desk, reference, LONG[:length], job)


def test_a_beginning_that_the_engine_had_already_is_exported_too(
    desk: Any, reference: Reference
) -> None:
    done(desk, LONG)
    again = done(desk, [*LONG[:200], 7, 8, 9])
    [cached] = [rest[1] for kind, *rest in desk.heard.of(again.name) if kind == "prefilled"]
    assert cached > 0
    check(desk, reference, [*LONG[:200], 7, 8, 9], again)


def test_the_first_token_is_the_likeliest_of_the_reference(desk: Any, reference: Reference) -> None:
    from backends.api import PrefillJob, Sampling, Sequence

    sequence = Sequence(prompt=LONG, generated=[], sampling=Sampling(temperature=0.0), seed=0)
    job = PrefillJob(name="greedy", salt=b"t", tokens=LONG, sequences=(sequence,))
    desk.engine.prefill(job)
    desk.ended(job, seconds=60)
    [[token]] = [rest[0] for kind, *rest in desk.heard.of("greedy") if kind == "prefilled"]
    logprobs = reference.logprobs_after(LONG)
    assert logprobs.max() - logprobs[token] < 0.1


def test_several_at_once_and_one_that_is_given_up(desk: Any, reference: Reference) -> None:
    prompts = [LONG[start : start + 150] for start in range(0, 100, 10)]
    jobs = [desk.job(prompt, n=1 + place % 2) for place, prompt in enumerate(prompts)]
    desk.engine.abort(jobs[3].name)
    desk.ended(*jobs, seconds=60)
    for place, (job, prompt) in enumerate(zip(jobs, prompts, strict=True)):
        if place != 3:
            check(desk, reference, prompt, job)
    until(lambda: not desk.engine.pins())
    assert not desk.engine._carrier._requests
    assert isinstance(desk.heard, Heard)
    assert not desk.heard.dead
