"""What a token gives is the same to the bit beside any others, in any chunk, either way."""

from __future__ import annotations

import numpy as np
import pytest

from backends.api import Row, Sampling, Sequence
from tests.emulation.desk import Desk, Line, hand_over, nothing, prompts

EVERYTHING = Sampling(temperature=0.0, logprobs=1 << 20)
CASES = [
    {},
    {"block_tokens": 5, "axes": "layer kv block token head dim"},
    {"block_tokens": 1, "axes": "token head kv layer block dim", "kv_dtype": "float16"},
    {"block_tokens": 48, "axes": "kv block head layer token dim", "kv_dtype": "bfloat16"},
]


@pytest.fixture(params=["float32", "q4", "qwen3"])
def make(request, onnx, four_bits, tmp_path):
    """Make desks over a model of that form."""
    if request.param != "qwen3":
        return lambda **options: onnx(four_bits, weights=request.param, **options)
    from tests.emulation.conftest import make_model

    make_model("qwen3").save_pretrained(tmp_path / "qwen3")
    return lambda **options: onnx(tmp_path / "qwen3", **options)


def exact(desk: Desk, text, chunk=1 << 20) -> np.ndarray:
    """The raw log probabilities after `text`."""
    line = Line(text, EVERYTHING)
    desk.prefill(line, chunk)
    desk.release(line)
    return by_token(line.sampled[0])


def by_token(sampled) -> np.ndarray:
    return np.array([value for _, value in sorted(sampled.logprob.top)])


@pytest.mark.parametrize("options", CASES, ids=lambda it: it.get("axes", "default"))
def test_chunks_change_nothing(make, options):
    desk = make(**options)
    for text in prompts(5, 90, 150):
        whole = exact(desk, text)
        for chunk in (1, 2, 3, 7, 16, 33, 64):
            np.testing.assert_array_equal(exact(desk, text, chunk), whole)


@pytest.mark.parametrize("options", CASES, ids=lambda it: it.get("axes", "default"))
def test_decoding_gives_what_prefilling_gives(make, options):
    desk = make(**options)
    lines = [Line(text, EVERYTHING) for text in prompts(6, 90, 120)]
    for line in lines:
        desk.prefill(line, 29)
    desk.decode(lines, 20)
    for line in lines:
        for number in (1, 7, 20):
            text = line.tokens[: len(line.sequence.prompt) + number]
            np.testing.assert_array_equal(exact(desk, text), by_token(line.sampled[number]))


def test_neighbours_change_nothing(make):
    """Decode rows and chunks of other prompts in one batch, in several orders."""
    desk = make(pool_tokens=8192)
    numbers = np.random.default_rng(3)
    texts = prompts(12, 90, 200)
    alone = [exact(desk, text) for text in texts]
    for _ in range(4):
        rows, lines = [], []
        order = numbers.permutation(len(texts)).tolist()
        for place in order:
            line = Line(texts[place], EVERYTHING)
            done = int(numbers.integers(0, len(line.tokens)))
            if done:
                desk.backend.step([_part(desk, line, 0, done)], nothing)
            rows.append(desk.row(line, done, len(line.tokens)))
            lines.append(line)
        outputs = desk.backend.step(rows, nothing)
        for place, output in zip(order, outputs, strict=True):
            np.testing.assert_array_equal(by_token(output.sampled[0]), alone[place])
        desk.release(*lines)


def _part(desk: Desk, line: Line, start: int, end: int) -> Row:
    desk.cover(line, end)
    return Row(tokens=line.tokens[start:end], start=start, blocks=list(line.blocks))


def test_threads_change_nothing(four_bits, onnx):
    one = onnx(four_bits)
    from backends.onnxruntime import OnnxRuntimeBackend

    two = Desk(OnnxRuntimeBackend(model=str(four_bits), threads=2, pool_tokens=2048))
    for text in prompts(4, 90, 200):
        np.testing.assert_array_equal(exact(one, text), exact(two, text))
    two.backend.close()


def test_a_handoff_changes_nothing(make):
    """The other engine's blocks, axes and place in the pool are different ones."""
    source, target = make(block_tokens=16), make(**CASES[1])
    for text in prompts(5, 90, 150):
        line = Line(text, EVERYTHING)
        source.prefill(line)
        arrived = hand_over(source, line, target)
        for desk, there in ((source, line), (target, arrived)):
            desk.decode([there], 8)
        assert [it.logprob for it in line.sampled[1:]] == [it.logprob for it in arrived.sampled]


def test_what_others_left_in_a_pool_is_never_read(make):
    desk = make(block_tokens=32)
    text = prompts(4, 90, 100)[-1]
    clean = exact(desk, text)
    np.frombuffer(desk.backend.pool, np.float32)[:] = np.nan
    line = Line(text, EVERYTHING)
    desk.prefill(line, 11)
    np.testing.assert_array_equal(by_token(line.sampled[0]), clean)


def test_sequences_that_share_a_prefix_are_sampled_each_with_its_seed(make):
    desk = make()
    warm = [
        Sequence(prompt=[3, 1, 4], generated=[], sampling=Sampling(), seed=it) for it in range(8)
    ]
    line = Line([3, 1, 4])
    desk.cover(line, 3)
    row = Row(tokens=[3, 1, 4], start=0, blocks=line.blocks, sequences=tuple(warm))
    together = [it.token for it in desk.backend.step([row], nothing)[0].sampled]
    for sequence, token in zip(warm, together, strict=True):
        alone = Row(tokens=[3, 1, 4], start=0, blocks=line.blocks, sequences=(sequence,))
        assert desk.backend.step([alone], nothing)[0].sampled[0].token == token
    assert len(set(together)) > 1
