"""The tiny models of the torch engine's tests, and one in a GGUF file's blocks of four bits."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from backends.emulation import EmulationBackend
from backends.onnxruntime import OnnxRuntimeBackend
from tests.emulation.conftest import family, tiny_folder  # noqa: F401 (fixtures)
from tests.emulation.desk import Desk

KINDS = {
    "token_embd": "Q8_0", "attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "Q8_0",
    "attn_output": "Q4_0", "ffn_gate": "Q4_1", "ffn_up": "Q4_0", "ffn_down": "Q4_1",
}  # fmt: skip
SHAPES = {
    "token_embd": (96, 64), "attn_q": (128, 64), "attn_k": (64, 64), "attn_v": (64, 64),
    "attn_output": (64, 128), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
}  # fmt: skip
LAYERS = 2


def write_four_bits(path, **changes):
    """A model of two layers, its matrices in blocks of several kinds (`changes` to `KINDS`)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": LAYERS, "context_length": 512, "embedding_length": 64,
        "feed_forward_length": 96, "attention.head_count": 8, "attention.head_count_kv": 4,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.attention.key_length", 16)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 95)
    numbers = np.random.default_rng(7)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(64, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            if name == "token_embd" and layer:
                continue
            values = numbers.normal(0, 0.15, shape).astype(np.float32)
            kind = gguf.GGMLQuantizationType[{**KINDS, **changes}[name]]
            place = name if name == "token_embd" else f"blk.{layer}.{name}"
            writer.add_tensor(f"{place}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def four_bits(tmp_path_factory):
    return write_four_bits(tmp_path_factory.mktemp("gguf") / "four.gguf")


@pytest.fixture
def onnx():
    """Make desks over the ONNX Runtime engine."""
    made = []

    def make(model, **options) -> Desk:
        made.append(
            OnnxRuntimeBackend(model=str(model), threads=1, **{"pool_tokens": 2048, **options})
        )
        return Desk(made[-1], seed=len(made))

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def torch_engine():
    """Make desks over the torch engine, in float32."""
    made = []

    def make(model, **options) -> Desk:
        wanted = {"dtype": "float32", "pool_tokens": 2048, **options}
        made.append(EmulationBackend(model=str(model), **wanted))
        return Desk(made[-1], seed=len(made))

    yield make
    for backend in made:
        backend.close()
