"""The real model in llama.cpp, from KV that it computed and from KV that others did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.api import Row, Sampling, StepFailed
from backends.errors import BackendMisconfigured
from backends.testing import Maker, conformance, summary
from backends.testing.alike import QUANTISED, apart
from backends.testing.carrying import carry
from backends.testing.desk import GREEDY, Desk, Line, nobody
from backends.testing.stepped.computing import forced
from tests.emulation.desk import bundled_model
from tests.llamacpp.conftest import ABSENT, FULL, installed
from tests.support.margin import assert_same_or_near_tie
from tests.support.tiny_gguf import write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed("llama_cpp"), reason=ABSENT)]

VOCABULARY = 49152
JUDGED = Sampling(temperature=0.0, ignore_eos=True, logprobs=256)


def prompts(count: int, longest: int) -> list[list[int]]:
    dice = np.random.default_rng(count)
    lengths = np.geomspace(1, longest, count).round().astype(int)
    return [dice.integers(3, 49000, int(length)).tolist() for length in lengths]


def hand_over(source: Desk, line: Line, target: Desk) -> Line:
    """Carry a prefilled line over tcp; both may go on."""
    arrived = Line(line.sequence.prompt, line.sequence.sampling, line.sequence.seed)
    arrived.generated.extend(line.generated)
    length = len(line.tokens) - 1
    target.cover(arrived, length)
    carry(source.backend, line.blocks, target.backend, arrived.blocks, length)
    target.ingest(arrived.blocks)
    return arrived


def test_it_is_known_as_the_same_model_with_the_same_weights(
    full: Desk, shipped: Desk, torch: Desk
) -> None:
    assert full.layout.model == shipped.layout.model == torch.layout.model
    assert full.layout.weights == torch.layout.weights == "float32"
    assert shipped.layout.weights == "q4_1"
    info = full.info
    assert (info.vocabulary, info.end_tokens, info.context_tokens) == (VOCABULARY, (2,), 4096)


def test_log_probabilities_are_those_of_the_torch_engine(full: Desk, torch: Desk) -> None:
    everything = Sampling(temperature=0.0, logprobs=VOCABULARY)
    for prompt in prompts(4, 300):
        (ours,) = full.run(prompt, 1, sampling=everything)
        (theirs,) = torch.run(prompt, 1, sampling=everything)
        found, wanted = dict(ours.logprob.top), dict(theirs.logprob.top)
        assert max(abs(found[it] - wanted[it]) for it in wanted) < 1e-3


@pytest.mark.parametrize("other", ["torch", "onnx"])
@pytest.mark.parametrize("prompt", prompts(8, 700), ids=len)
def test_text_after_a_handoff_is_that_of_either_engine_alone(
    full: Desk, other: str, prompt: list[int], request: pytest.FixtureRequest
) -> None:
    """Both ways, in float32; the engines' own texts are equal as well."""
    there = request.getfixturevalue(other)
    texts = []
    for source, target in ((there, full), (full, there)):
        line = Line(prompt)
        source.prefill(line)
        arrived = hand_over(source, line, target)
        for desk, each in ((source, line), (target, arrived)):
            desk.decode([each], 16)
            texts.append(each.generated)
            desk.release(each)
    assert all(text == texts[0] for text in texts), texts


@pytest.mark.parametrize("way", ["alone", "from torch", "to torch"])
def test_weights_as_shipped_are_within_the_bounds_of_quantised_ones(
    shipped: Desk, torch: Desk, way: str
) -> None:
    """Teacher-forced, beside torch in float32 alone."""
    ours, theirs = [], []
    for prompt in prompts(6, 200):
        text = Line(prompt, JUDGED)
        torch.prefill(text)
        torch.decode([text], 16)
        torch.release(text)
        theirs += text.sampled[1:]
        source, target = {
            "alone": (shipped, shipped), "from torch": (torch, shipped),
            "to torch": (shipped, torch),
        }[way]  # fmt: skip
        line = Line(prompt, JUDGED)
        if way == "alone":
            ours += forced(shipped, line, text.generated)[1:]
            continue
        source.prefill(line)
        arrived = hand_over(source, line, target)
        source.release(line)
        target.force(arrived, text.generated[:-1])
        target.release(arrived)
        ours += arrived.sampled
    found = apart(ours, theirs)
    assert found.kl is not None
    assert 1e-6 < found.kl < QUANTISED.kl, found
    assert found.top1 >= QUANTISED.top1, found


def test_sixteen_sequences_in_one_batch_say_what_each_says_alone(full: Desk) -> None:
    texts = prompts(16, 90)
    expected = [[it.token for it in full.run(prompt, 9)] for prompt in texts]
    lines = [Line(prompt) for prompt in texts]
    for line in lines:
        full.prefill(line)
    full.decode(lines, 8)
    assert [line.generated for line in lines] == expected
    full.release(*lines)


def test_a_seed_says_which_tokens_are_drawn_whoever_computes(full: Desk, torch: Desk) -> None:
    warm = Sampling(temperature=1.0)
    prompt = prompts(3, 60)[2]
    ours, theirs = (desk.run(prompt, 12, sampling=warm, seed=3) for desk in (full, torch))
    everything = Sampling(temperature=0.0, logprobs=VOCABULARY)

    def logits_after(tokens: list[int]) -> np.ndarray:
        top = dict(torch.run(tokens, 1, sampling=everything)[0].logprob.top)
        return np.array([top[token] for token in range(VOCABULARY)])

    assert_same_or_near_tie(
        [it.token for it in ours],
        [it.token for it in theirs],
        prompt=prompt,
        logits_after=logits_after,
        temperature=1.0,
        seed=3,
    )


def test_three_sequences_share_a_prefix_that_ends_inside_a_block(full: Desk) -> None:
    """As the host shares it out: full blocks are shared, the last one is copied for each."""
    prompt = prompts(2, 77)[1]
    warm = Sampling(temperature=1.0, ignore_eos=True)
    expected = [full.run(prompt, 8, sampling=warm, seed=seed) for seed in range(3)]
    lines = [Line(prompt, warm, seed) for seed in range(3)]
    row = full.row(lines[0], 0, len(prompt))
    row.sequences = tuple(line.sequence for line in lines)
    (output,) = full.step([row])
    for line, sampled in zip(lines, output.sampled, strict=True):
        line.take(sampled)
    whole = lines[0].blocks
    for line in lines[1:]:
        line.blocks = [*whole[:-1], full.free.pop()]
        full.copy_blocks([(whole[-1], line.blocks[-1])])
    full.decode(lines, 7)
    assert [line.sampled for line in lines] == expected
    full.clear()


def test_prompt_logprobs_come_for_every_token_of_a_long_prompt(full: Desk, torch: Desk) -> None:
    prompt = prompts(2, 300)[1]
    found = []
    for desk in (full, torch):
        line = Line(prompt)
        row = desk.row(line, 0, len(prompt))
        row.prompt_logprobs, row.following = 2, prompt[1:]
        (output,) = desk.step([row])
        found.append(output.prompt_logprobs)
        desk.release(line)
    ours, theirs = found
    assert [it.token for it in ours] == prompt[1:] == [it.token for it in theirs]
    assert max(abs(a.logprob - b.logprob) for a, b in zip(ours, theirs, strict=True)) < 1e-3


WIDE, NARROW = (32,), (16,)
FAMILIES = {
    "llama": {},
    "qwen2": {
        "output.weight": (100, 32), "blk.0.attn_q.bias": WIDE,
        "blk.0.attn_k.bias": NARROW, "blk.0.attn_v.bias": NARROW,
    },
    "qwen3": {"blk.0.attn_q_norm.weight": (8,), "blk.0.attn_k_norm.weight": (8,)},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_each_family_is_the_one_that_torch_computes(
    family: str, tmp_path: Path
) -> None:
    """RoPE in either pairing, biases, norms of heads, a pool smaller than a batch."""
    extra = {"tokenizer.ggml.model": "none", f"{family}.vocab_size": 100}
    path = write_gguf(tmp_path / "m.gguf", family, extra=extra, tensors=FAMILIES[family])
    options: dict[str, Any] = {"model": str(path), "threads": 1, "pool_tokens": 256}
    ours = Maker.of("backends.llamacpp:LlamaCppBackend", options).make(
        **FULL, cache_dir=str(tmp_path)
    )
    there = Maker.of("emulation", options).make(dtype="float32")
    desks = Desk(ours), Desk(there, 1)
    assert ours.info.layout.rope == there.info.layout.rope
    prompt = list(range(3, 80))
    for source, target in (desks, desks[::-1]):
        line = Line(prompt, Sampling(temperature=0.0, ignore_eos=True, logprobs=100))
        source.prefill(line, chunk=30)
        arrived = hand_over(source, line, target)
        source.decode([line], 6)
        target.force(arrived, line.generated[:-1])
        for one, other in zip(line.sampled[1:], arrived.sampled, strict=True):
            found, wanted = dict(one.logprob.top), dict(other.logprob.top)
            assert max(abs(found[it] - wanted[it]) for it in wanted) < 2e-3
        source.release(line)
        target.release(arrived)
    for desk in desks:
        desk.close()


@pytest.mark.parametrize(
    ("options", "unproven"),
    [(FULL, []), ({}, ["a_worker_continues_what_the_reference_computed"])],
    ids=["float32", "as stored"],
)
def test_it_keeps_every_promise_of_its_contract(
    options: dict[str, Any], unproven: list[str], tmp_path: Path
) -> None:
    """Unlike weights meet only where an operator allows it, and none is asked here."""
    extra = {"tokenizer.ggml.model": "none", "llama.vocab_size": 100}
    path = str(write_gguf(tmp_path / "m.gguf", extra=extra, context=512))
    report = conformance(
        "backends.llamacpp:LlamaCppBackend",
        {"model": path, "threads": 1, "cache_dir": str(tmp_path), **options},
        reference=("emulation", {"model": path, "dtype": "float32"}),
    )
    assert report.ok, summary(report)
    assert [it.promise for it in report.verdicts if it.outcome != "kept"] == unproven


@pytest.fixture
def small() -> Any:
    """A pool of 512 tokens."""
    from backends.llamacpp import LlamaCppBackend

    desk = Desk(LlamaCppBackend(model=bundled_model(), threads=1, pool_tokens=512, **FULL))
    yield desk
    desk.close()


def test_the_whole_pool_can_be_filled_and_used_again(small: Desk) -> None:
    """Its own memory is as large: what ended is given up where the room is needed."""
    expected = small.run(list(range(100, 160)), 4)
    for turn in range(3):
        lines = [Line(range(100 + turn + it, 160 + turn + it)) for it in range(8)]
        for line in lines:
            small.prefill(line)
        small.decode(lines, 3)
        assert not small.free
        if turn == 0:
            assert lines[0].generated == [it.token for it in expected]
        small.release(*lines)


def test_what_is_not_a_number_fails_the_step_and_the_next_one_is_right(small: Desk) -> None:
    prompt = list(range(200, 240))
    expected = small.run(prompt, 4)
    line = Line(prompt)
    small.prefill(line)
    kept = bytes(small.backend.pool)
    np.frombuffer(small.backend.pool, np.uint8)[:] = 255
    small.ingest(line.blocks)
    with pytest.raises(StepFailed, match="no finite logit"):
        small.decode([line], 1)
    np.frombuffer(small.backend.pool, np.uint8)[:] = np.frombuffer(kept, np.uint8)
    small.ingest(line.blocks)
    small.decode([line], 3)
    assert line.generated == [it.token for it in expected]


def test_more_rows_than_a_batch_are_refused(small: Desk) -> None:
    sequence = Line([5, 6], GREEDY).sequence
    row = Row(tokens=[5, 6], start=0, blocks=[0], sequences=(sequence,))
    with pytest.raises(StepFailed, match="65 rows of at most 64"):
        small.backend.step([row] * 65, nobody)


@pytest.mark.parametrize("change", [{"layers": 29}, {"numbers": 191}], ids=str)
def test_a_library_that_writes_another_state_is_refused(change: dict[str, Any]) -> None:
    """As one of another version would: what is expected differs from what it writes."""
    from backends.llamacpp.library import Context
    from backends.llamacpp.state import Form

    known = {"layers": 30, "numbers": 192, "dtype": "float32", "transposed": True}
    limits = {"cells": 256, "sequences": 2, "threads": 1}
    Context(Path(bundled_model()), Form(**known), **limits).close()
    with pytest.raises(BackendMisconfigured, match=r"state of one token .*: this version"):
        Context(Path(bundled_model()), Form(**known | change), **limits)
