"""The probabilities are the torch engine's, for every family, pairing and form of weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.errors import BackendMisconfigured
from backends.onnxruntime.packing import BLOCK, Packed, Weights
from tests.emulation.desk import Line, hand_over, prompts
from tests.onnx_engine.conftest import KINDS, write_four_bits
from tests.support.margin import assert_same_or_near_tie

TEXTS = prompts(5, 90, 120)


@pytest.mark.parametrize("rope", ["auto", "interleaved", "half"])
def test_every_family_gives_the_probabilities_of_torch(family, onnx, torch_engine, rope):
    _, folder = family
    ours, theirs = onnx(folder, rope=rope), torch_engine(folder)
    for text in TEXTS:
        np.testing.assert_allclose(
            ours.logprobs_after(text), theirs.logprobs_after(text), atol=3e-4
        )


def test_both_engines_state_the_same_model_and_weights(family, onnx, torch_engine):
    _, folder = family
    ours, theirs = (make(folder).backend.info for make in (onnx, torch_engine))
    assert ours.layout == theirs.layout
    assert ours.vocabulary, ours.end_tokens == (theirs.vocabulary, theirs.end_tokens)


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_a_narrow_pool_rounds_as_that_of_torch_does(family, onnx, torch_engine, kv_dtype):
    _, folder = family
    ours, theirs = (make(folder, kv_dtype=kv_dtype) for make in (onnx, torch_engine))
    for text in TEXTS:
        np.testing.assert_allclose(
            ours.logprobs_after(text), theirs.logprobs_after(text), atol=3e-2
        )


def test_a_prefix_goes_from_either_engine_to_the_other(family, onnx, torch_engine):
    _, folder = family
    torch = torch_engine(folder, block_tokens=32, axes="layer kv block token head dim")
    ours = onnx(folder, block_tokens=8, axes="head block layer kv token dim")
    for source, target in ((torch, ours), (ours, torch)):
        for text in TEXTS:
            alone = source.text(text, 16)
            line = Line(text)
            source.prefill(line)
            arrived = hand_over(source, line, target)
            target.decode([arrived], 15)
            assert_same_or_near_tie(
                alone,
                arrived.generated,
                prompt=text,
                logits_after=torch.logprobs_after,
                temperature=0.0,
                seed=0,
            )
            source.release(line)
            target.release(arrived)


def unpacked(packed: Packed) -> np.ndarray:
    """What `MatMulNBits` and the sums make of a matrix, [out, in]."""
    codes = packed.codes.astype(np.float32)
    if packed.bits == 4:
        codes = np.stack([packed.codes & 0xF, packed.codes >> 4], -1).astype(np.float32)
    numbers = codes.reshape(*packed.scales.shape, BLOCK) - (1 << packed.bits - 1)
    numbers *= packed.scales[..., None]
    if packed.rest is not None:
        numbers += packed.rest[..., None]
    return numbers.reshape(len(codes), -1)


def test_blocks_of_a_file_are_carried_as_they_are(four_bits):
    checkpoint = GGUFCheckpoint(four_bits)
    weights = Weights(checkpoint, "interleaved", packed=True)
    for name in sorted(checkpoint.names()):
        if "norm" not in name:
            np.testing.assert_allclose(
                unpacked(weights.matrix(name)), checkpoint.tensor(name), atol=1e-6
            )
    checkpoint.close()


@pytest.mark.parametrize("rope", ["auto", "half"])
def test_four_bits_are_near_float32(four_bits, onnx, rope):
    packed, exact = onnx(four_bits, rope=rope), onnx(four_bits, weights="float32")
    assert packed.backend.info.layout.weights == "q4"
    assert exact.backend.info.layout.weights == "float32"
    for text in TEXTS:
        given, right = packed.logprobs_after(text), exact.logprobs_after(text)
        divergence = float((np.exp(right) * (right - given)).sum())
        assert 0 < divergence < 0.01, "activations are rounded, weights are not"


def test_a_kind_of_block_that_is_not_carried_is_refused_by_tensor(tmp_path, onnx):
    path = write_four_bits(tmp_path / "m.gguf", ffn_up="Q5_0")
    assert onnx(path).backend.info.layout.weights == "float32"
    with pytest.raises(BackendMisconfigured, match=r"weights: tensor blk.0.ffn_up.weight is Q5_0"):
        onnx(path, weights="q4")


def test_four_bits_of_a_folder_are_refused(tiny_folder, onnx):
    with pytest.raises(BackendMisconfigured, match="weights: q4 needs a GGUF file"):
        onnx(tiny_folder, weights="q4")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_file_of_one_kind_runs(tmp_path, onnx, kind):
    path = write_four_bits(tmp_path / "m.gguf", **dict.fromkeys(KINDS, kind))
    desk = onnx(path, weights="auto" if kind == "Q8_0" else "q4")
    assert desk.backend.info.layout.weights == ("float32" if kind == "Q8_0" else "q4")
    assert len(desk.text([1, 2, 3], 5)) == 5
    assert gguf.GGMLQuantizationType[kind]
