"""The engine as the host sees it: options, layers as they become final, failures, the end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from backends.api import Row, Sampling, StepFailed
from backends.errors import BackendMisconfigured
from backends.host import load_backend
from backends.onnxruntime import OnnxRuntimeBackend
from tests.emulation.desk import Line, canonical, nothing

BAD_OPTIONS = [
    ({"model": "/nowhere"}, "model: '/nowhere' is neither"),
    ({"weights": "int8"}, "weights: Invalid enum value 'int8'"),
    ({"kv_dtype": "int8"}, "kv_dtype: Invalid enum value 'int8'"),
    ({"threads": 0}, "threads must be a whole number 1 to 1024"),
    ({"pool_tokens": 0}, "pool_tokens must be"),
    ({"pool_tokens": 64, "pool_blocks": 4}, "exclude each other"),
    ({"pool_tokens": 1 << 32}, "of memory"),
    ({"block_tokens": 257}, "block_tokens must be a whole number 1 to 256"),
    ({"axes": "block layer kv head dim token"}, "axes must name"),
    ({"context_tokens": 513}, "the model was made for 512"),
    ({"rope": "spiral"}, "rope: Invalid enum value"),
    ({"max_batch": 0}, "max_batch must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_a_wrong_option_is_refused_by_name(four_bits, options, message):
    with pytest.raises(BackendMisconfigured) as caught:
        OnnxRuntimeBackend(**{"model": str(four_bits), **options})
    assert message in str(caught.value)


def test_the_plug_in_is_found_by_its_name_and_brings_no_torch(four_bits):
    backend = load_backend("onnxruntime", {"model": str(four_bits), "pool_tokens": 64})
    assert isinstance(backend, OnnxRuntimeBackend)
    backend.close()
    program = (
        "import sys, backends.onnxruntime\n"
        "assert 'onnx' not in sys.modules\n"
        "backends.onnxruntime.OnnxRuntimeBackend\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_threads_are_as_many_as_the_environment_says(monkeypatch):
    from backends.onnxruntime.options import read_options

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert read_options({"model": "x"}).cpus == 3
    assert read_options({"model": "x", "threads": 2}).cpus == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert read_options({"model": "x"}).cpus >= 1


def test_a_layer_is_reported_when_its_kv_is_final(onnx, four_bits):
    desk = onnx(four_bits)
    chunks, decoded = [Line(range(3, 33)), Line(range(40, 60))], Line([5, 6, 7])
    desk.prefill(decoded)
    rows = [
        desk.row(chunks[0], 0, 30),
        desk.row(decoded, 3, 4),
        desk.row(chunks[1], 0, 20),
    ]
    seen: list[tuple[int, int, bytes]] = []
    pool = canonical(desk.backend)

    def ready(row: int, layer: int) -> None:
        seen.append((row, layer, pool[layer][:, rows[row].blocks].tobytes()))

    desk.backend.step(rows, ready)
    assert [it[:2] for it in seen] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    for row, layer, kv in seen:
        assert kv == pool[layer][:, rows[row].blocks].tobytes()
        assert np.frombuffer(kv, np.float32).any()


def test_what_the_host_raises_on_a_layer_comes_out_of_the_step(onnx, four_bits):
    desk = onnx(four_bits)

    def ready(row: int, layer: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        desk.backend.step([desk.row(Line(range(5)), 0, 5)], ready)
    assert len(desk.text([1, 2, 3], 4)) == 4


@pytest.mark.parametrize("place", ["key", "value"])
def test_kv_that_is_no_number_fails_the_step(onnx, four_bits, place):
    desk = onnx(four_bits)
    line = Line(range(3, 30))
    desk.prefill(line)
    pool = canonical(desk.backend).view(np.float32)
    pool[1, 0 if place == "key" else 1, line.blocks[0], 3] = np.nan
    with pytest.raises(StepFailed, match="not numbers"):
        desk.decode([line], 1)


@pytest.mark.parametrize(
    "row",
    [
        Row(tokens=[96], start=0, blocks=[0]),
        Row(tokens=[1], start=0, blocks=[]),
        Row(tokens=[1], start=0, blocks=[128]),
        Row(tokens=[1], start=512, blocks=[0] * 33),
    ],
    ids=["vocabulary", "no block", "a strange block", "context"],
)
def test_a_row_outside_model_or_pool_fails_the_step(onnx, four_bits, row):
    desk = onnx(four_bits)
    with pytest.raises(StepFailed, match="row 0"):
        desk.backend.step([row], nothing)
    assert desk.backend.step([], nothing) == []


def test_prompt_logprobs_are_those_of_each_prefix(onnx, four_bits):
    desk = onnx(four_bits)
    text = [3, 1, 41, 59, 26]
    line = Line(text)
    desk.cover(line, len(text))
    row = Row(tokens=text, start=0, blocks=line.blocks, prompt_logprobs=2, following=text[1:])
    (output,) = desk.backend.step([row], nothing)
    for number, logprob in enumerate(output.prompt_logprobs):
        right = desk.logprobs_after(text[: number + 1])
        assert logprob.token == text[number + 1]
        assert logprob.logprob == pytest.approx(right[logprob.token], abs=1e-6)
        assert [token for token, _ in logprob.top] == np.argsort(-right)[:2].tolist()


def test_copied_blocks_go_on_like_their_originals(onnx, four_bits):
    desk = onnx(four_bits, axes="layer kv block token head dim")
    line = Line(range(3, 40), Sampling(temperature=0.0, logprobs=3))
    desk.prefill(line)
    copied = Line(line.sequence.prompt, line.sequence.sampling)
    copied.sequence.generated.extend(line.generated)
    desk.cover(copied, len(line.tokens))
    desk.cover(line, len(line.tokens))
    desk.backend.copy_blocks(list(zip(line.blocks, copied.blocks, strict=True)))
    desk.decode([line], 5)
    desk.decode([copied], 5)
    assert copied.sampled == line.sampled[1:]
    with pytest.raises(StepFailed, match="a block outside"):
        desk.backend.copy_blocks([(0, 128)])


def test_progress_rises_to_one(four_bits):
    told: list[tuple[str, float]] = []
    OnnxRuntimeBackend(
        model=str(four_bits), pool_tokens=64, threads=1, progress=lambda *it: told.append(it)
    ).close()
    assert told == [
        ("open", 0.0), ("pool", 0.0), ("pool", 1.0),
        ("weights", 0.0), ("weights", 0.5), ("weights", 1.0),
    ]  # fmt: skip
