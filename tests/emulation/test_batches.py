"""What a row computes does not depend on its neighbours, its chunks, or where its blocks lie."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from backends.api import Row, Sampling, StepFailed
from tests.emulation.desk import Desk, Line, canonical, hand_over, nothing, prompts
from tests.support.margin import assert_same_or_near_tie

LAYOUTS = [
    {"block_tokens": 16},
    {"block_tokens": 5, "axes": "layer kv block token head dim"},
    {"block_tokens": 32, "axes": "token head kv layer block dim"},
    {"block_tokens": 1, "axes": "block head layer kv token dim"},
    {"block_tokens": 7, "axes": "kv head block layer token dim", "rope": "half"},
]
WARM = Sampling(temperature=1.0)


def same(desk: Desk, prompt, left, right, sampling=None, seed=0) -> None:
    assert_same_or_near_tie(
        left,
        right,
        prompt=prompt,
        logits_after=desk.logprobs_after,
        temperature=sampling.temperature if sampling else 0.0,
        seed=seed,
    )


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: o.get("axes", "default"))
def test_every_layout_gives_the_same_tokens(tiny, options):
    plain, other = tiny(), tiny(**options)
    for prompt in prompts(6, 211, 150):
        same(plain, prompt, plain.text(prompt, 20), other.text(prompt, 20, chunk=33))


@pytest.mark.parametrize("chunk", [2, 16, 17, 64])
def test_every_chunking_gives_the_same_tokens(tiny, chunk):
    desk = tiny()
    for prompt in prompts(6, 211, 150):
        same(desk, prompt, desk.text(prompt, 10), desk.text(prompt, 10, chunk=chunk))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), WARM], ids=["greedy", "seeded"])
def test_a_sequence_alone_and_in_a_batch_gives_the_same_tokens(tiny, sampling):
    desk = tiny(block_tokens=8, pool_tokens=8192)
    texts = prompts(16, 211, 200)
    lines = [Line(prompt, sampling, seed=100 + i) for i, prompt in enumerate(texts)]
    for line in lines:
        desk.prefill(line)
    desk.decode(lines, 24)
    for number, (prompt, line) in enumerate(zip(texts, lines, strict=True)):
        alone = desk.text(prompt, 25, sampling=sampling, seed=100 + number)
        same(desk, prompt, alone, line.generated, sampling, seed=100 + number)


def test_prefill_and_decode_rows_share_a_step(tiny):
    desk = tiny(block_tokens=8)
    first, second, third = (Line(prompt) for prompt in prompts(3, 211, 90))
    desk.prefill(first)
    rows = [
        desk.row(second, 0, len(second.tokens)),
        desk.row(first, len(first.tokens) - 1, len(first.tokens)),
        desk.row(third, 0, 40),
    ]
    reported = []
    outputs = desk.backend.step(rows, lambda row, layer: reported.append((row, layer)))
    assert [len(output.sampled) for output in outputs] == [1, 1, 0]
    chunks = [number for number, row in enumerate(rows) if len(row.tokens) > 1]
    assert sorted(reported) == sorted(itertools.product(chunks, range(3)))
    assert [layer for _, layer in reported] == sorted(layer for _, layer in reported)
    second.take(outputs[0].sampled[0])
    first.take(outputs[1].sampled[0])
    for line in (first, second):
        alone = desk.text(line.sequence.prompt, len(line.generated))
        same(desk, line.sequence.prompt, alone, line.generated)


def test_a_layer_is_in_the_pool_when_it_is_reported_ready(tiny):
    desk = tiny()
    line = Line(prompts(1, 211, 60)[0] * 60)
    row = desk.row(line, 0, len(line.tokens))
    seen = {}

    def ready(_row: int, layer: int) -> None:
        seen[layer] = canonical(desk.backend)[layer][:, row.blocks].copy()

    desk.backend.step([row], ready)
    for layer, kv in seen.items():
        assert kv.any()
        assert (kv == canonical(desk.backend)[layer][:, row.blocks]).all()


def test_several_sequences_draw_from_one_prefix(tiny):
    desk = tiny()
    prompt = prompts(3, 211, 60)[-1]
    lines = [Line(prompt, WARM, seed=seed) for seed in range(8)]
    row = desk.row(lines[0], 0, len(prompt))
    row.sequences = tuple(line.sequence for line in lines)
    (output,) = desk.backend.step([row], nothing)
    tokens = [sampled.token for sampled in output.sampled]
    assert len(set(tokens)) > 1
    for line, token in zip(lines, tokens, strict=True):
        alone = desk.text(prompt, 1, sampling=WARM, seed=line.sequence.seed)
        same(desk, prompt, alone, [token], WARM, seed=line.sequence.seed)


@pytest.mark.parametrize("options", LAYOUTS[:4], ids=lambda o: o.get("axes", "default"))
def test_tokens_go_on_from_a_copied_cache_as_from_the_original(tiny, options):
    source, target = tiny(block_tokens=32, axes="layer kv block token head dim"), tiny(**options)
    for prompt in prompts(8, 211, 150):
        line = Line(prompt)
        source.prefill(line)
        arrived = hand_over(source, line, target)
        target.decode([arrived], 20)
        source.decode([line], 20)
        same(source, prompt, line.generated, arrived.generated)
        source.release(line)
        target.release(arrived)


def test_a_copied_block_holds_the_same_prefix(tiny):
    desk = tiny(block_tokens=8)
    line = Line(prompts(2, 211, 60)[-1])
    desk.prefill(line)
    held = line.blocks
    fork = Line(line.sequence.prompt)
    fork.sequence.generated.extend(line.generated)
    desk.cover(fork, len(line.tokens) - 1)
    desk.backend.copy_blocks(list(zip(held, fork.blocks, strict=True)))
    desk.decode([line], 9)
    desk.decode([fork], 9)
    assert line.generated == fork.generated
    assert set(held).isdisjoint(fork.blocks)


def test_garbage_in_blocks_before_use_never_reaches_a_token(tiny):
    clean, dirty = tiny(block_tokens=16), tiny(block_tokens=16)
    np.frombuffer(dirty.backend.pool, np.float32)[:] = np.nan
    texts = prompts(6, 211, 100)
    lines = [Line(prompt) for prompt in texts]
    for line in lines:
        dirty.prefill(line, chunk=23)
    dirty.decode(lines, 20)
    for prompt, line in zip(texts, lines, strict=True):
        same(clean, prompt, clean.text(prompt, 21), line.generated)


def test_garbage_beyond_an_arrived_prefix_never_reaches_a_token(tiny):
    source, target = tiny(block_tokens=16), tiny(block_tokens=16)
    np.frombuffer(target.backend.pool, np.float32)[:] = np.nan
    for prompt in prompts(6, 211, 100):
        line = Line(prompt)
        source.prefill(line)
        arrived = hand_over(source, line, target)
        target.decode([arrived], 20)
        source.decode([line], 20)
        same(source, prompt, line.generated, arrived.generated)


def bad_rows(desk: Desk):
    covered = list(range(4))
    yield Row(tokens=[], start=0, blocks=covered)
    yield Row(tokens=[1], start=-1, blocks=covered)
    yield Row(tokens=[1] * 3, start=510, blocks=list(range(40)))
    yield Row(tokens=[1] * 65, start=0, blocks=covered)
    yield Row(tokens=[1], start=0, blocks=[desk.backend.info.pool_blocks])
    yield Row(tokens=[1], start=0, blocks=[-1])
    yield Row(tokens=[211], start=0, blocks=covered)
    yield Row(tokens=[1, -1], start=0, blocks=covered)
    yield Row(tokens=[1, 2, 3], start=0, blocks=covered, prompt_logprobs=1, following=[2])
    yield Row(tokens=[1, 2], start=0, blocks=covered, prompt_logprobs=1, following=[2, 211])


@pytest.mark.parametrize("number", range(10))
def test_a_row_outside_model_or_pool_fails_the_step_and_writes_nothing(tiny, number):
    desk = tiny()
    before = bytes(desk.backend.pool)
    row = list(bad_rows(desk))[number]
    good = Row(tokens=[1, 2], start=0, blocks=[9])
    with pytest.raises(StepFailed, match="row 1"):
        desk.backend.step([good, row], nothing)
    assert bytes(desk.backend.pool) == before
    assert desk.backend.step([], nothing) == []


def test_broken_weights_fail_the_step_instead_of_choosing_a_token(tiny):
    desk = tiny()
    line = Line([5, 6, 7])
    desk.prefill(line)
    canonical(desk.backend)[:, :, line.blocks[0], 1] = 0x7FC00000  # a float32 NaN
    desk.backend.ingest(line.blocks)
    with pytest.raises(StepFailed, match="not numbers"):
        desk.decode([line], 1)
