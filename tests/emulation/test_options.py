"""A wrong option or a checkpoint that is not supported is refused, by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys

import pytest

from backends.emulation import EmulationBackend
from backends.errors import BackendMisconfigured
from tests.emulation.desk import Desk
from tests.support.tiny_gguf import write_gguf

BAD = [
    ({"model": "/nowhere"}, "model: '/nowhere'"),
    ({"model": 3}, "model: Expected `str`"),
    ({"dtype": "float64"}, "dtype: "),
    ({"dtype": "float16"}, "dtype: "),
    ({"kv_dtype": "int8"}, "kv_dtype: "),
    ({"device": "tpu"}, "device: "),
    ({"threads": 0}, "threads must be a whole number 1 to 1024, is 0"),
    ({"threads": "2"}, "threads: Expected `int | null`, got `str`"),
    ({"threads": 1.5}, "threads: "),
    ({"threads": True}, "threads: "),
    ({"pool_tokens": 0}, "pool_tokens must"),
    ({"pool_tokens": 1 << 31}, "pool_tokens: the pool would take"),
    ({"pool_blocks": -1}, "pool_blocks must"),
    ({"pool_blocks": 1 << 28}, "pool_blocks: the pool would take"),
    ({"pool_blocks": 4, "pool_tokens": 4}, "pool_tokens and pool_blocks exclude"),
    ({"block_tokens": 257}, "block_tokens must"),
    ({"block_tokens": None}, "block_tokens: "),
    ({"axes": "block layer"}, "axes must name"),
    ({"axes": "dim block layer kv head token"}, "axes must name"),
    ({"axes": "block layer kv head token token dim"}, "axes must name"),
    ({"context_tokens": 0}, "context_tokens must"),
    ({"context_tokens": 513}, "context_tokens is 513, but the model was made for 512"),
    ({"rope": "quarter"}, "rope: "),
    ({"max_batch": 0}, "max_batch must"),
    ({"shards": 0}, "shards must"),
    ({"shards": 4}, "shards: "),
    ({"shards": 2, "device": "cuda"}, "shards: only where device is cpu"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_a_bad_option_is_named(tiny_folder, options, message):
    with pytest.raises(BackendMisconfigured) as caught:
        EmulationBackend(**{"model": str(tiny_folder), **options})
    assert message in str(caught.value)


def test_cuda_without_a_device_is_refused(tiny_folder):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(BackendMisconfigured, match="device: torch sees no CUDA device"):
        EmulationBackend(model=str(tiny_folder), device="cuda")


def test_capacity_is_what_the_options_say(tiny):
    info = tiny(pool_tokens=100, block_tokens=16).backend.info
    assert (info.pool_blocks, info.context_tokens) == (7, 112)
    info = tiny(pool_tokens=None, pool_blocks=50, context_tokens=300, max_batch=3).backend.info
    assert (info.pool_blocks, info.context_tokens, info.max_batch) == (50, 300, 3)
    pool = tiny(pool_tokens=100, kv_dtype="float16").backend
    assert memoryview(pool.pool).nbytes == pool.info.pool_blocks * pool.info.layout.block_bytes
    assert not memoryview(pool.pool).readonly


def test_progress_rises_to_one_in_every_phase(tiny):
    told: list[tuple[str, float]] = []
    tiny(progress=lambda phase, fraction: told.append((phase, fraction)))
    for phase in ("pool", "weights"):
        fractions = [fraction for name, fraction in told if name == phase]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1


def test_the_synthetic_backend_imports_no_torch():
    program = (
        "import sys, backends.emulation.synthetic, backends.emulation\n"
        "backends.emulation.SyntheticBackend\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- folders -------------------------------------------------------------------------------

CONFIGS = [
    ({"model_type": "gemma"}, "model_type is 'gemma'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters in config.json lacks 'factor'"),
    ({"num_hidden_layers": 4}, "lacks the tensor blk.3."),
    ({"num_hidden_layers": 2}, "has no tensor blk.2."),
    ({"num_hidden_layers": None}, "num_hidden_layers in config.json must be a whole number"),
    ({"num_hidden_layers": 0}, "layers must be 1 to 1024"),
    ({"num_key_value_heads": 4}, "heads (6) must be a multiple of kv_heads (4)"),
    ({"head_dim": 15}, "head_dim must be even"),
    ({"hidden_size": 60}, "has shape"),
    ({"model_type": "qwen3"}, "lacks the tensor blk.0.attn_k_norm.weight"),
    ({"eos_token_id": 211}, "end tokens (211,) exceed the vocabulary of 211"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be token ids"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=str)
def test_a_config_that_asks_for_more_is_refused_by_field(tiny_folder, tmp_path, changes, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BackendMisconfigured) as caught:
        EmulationBackend(model=str(folder), pool_tokens=64)
    assert message in str(caught.value)


def test_a_broken_folder_is_refused_by_file(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    for content, message in ((weights.read_bytes()[:-100], "cannot read"), (None, "holds no")):
        if content is None:
            weights.unlink()
        else:
            weights.write_bytes(content)
        with pytest.raises(BackendMisconfigured, match=message):
            EmulationBackend(model=str(folder), pool_tokens=64)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(BackendMisconfigured, match="outside the folder"):
        EmulationBackend(model=str(folder), pool_tokens=64)
    (folder / "config.json").write_text("{")
    with pytest.raises(BackendMisconfigured, match="not valid JSON"):
        EmulationBackend(model=str(folder), pool_tokens=64)
    (folder / "config.json").write_text("[]")
    with pytest.raises(BackendMisconfigured, match="JSON object"):
        EmulationBackend(model=str(folder), pool_tokens=64)


# ---- GGUF files ----------------------------------------------------------------------------


def load(path) -> EmulationBackend:
    return EmulationBackend(model=str(path), dtype="float32", pool_tokens=64)


def test_a_gguf_file_of_several_types_loads_and_runs(tmp_path):
    desk = Desk(load(write_gguf(tmp_path / "m.gguf")))
    info = desk.backend.info
    assert (info.end_tokens, info.vocabulary, info.context_tokens) == ((4, 9), 100, 64)
    assert info.layout.rope == "interleaved"
    assert len(desk.text([1, 2, 3], 5)) == 5
    assert desk.logprobs_after([3, 1]) == pytest.approx(
        Desk(load(tmp_path / "m.gguf")).logprobs_after([3, 1])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "gpt2"}, "general.architecture is 'gpt2'"),
        ({"drop": ("block_count",)}, "lacks llama.block_count"),
        ({"drop": ("block_count",), "extra": {"llama.block_count": "1"}}, "must be one number"),
        ({"extra": {"general.alignment": "x"}}, "general.alignment"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type 'yarn'"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, "llama.rope.scaling.type"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": (4, 32)}}, "no tensor blk.0.ffn_gate_inp"),
        ({"tensors": {"blk.0.attn_k.weight": (32, 32)}}, "tensor blk.0.attn_k.weight has shape"),
        ({"tensors": {"blk.0.attn_k.weight": (16, 32, 1, 1)}}, "has shape"),
    ],
    ids=str,
)
def test_a_gguf_file_that_is_not_supported_is_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(BackendMisconfigured) as caught:
        load(path)
    assert message in str(caught.value)


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 20, *range(24, 3000, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BackendMisconfigured, match="GGUF"):
            load(path)


@pytest.mark.parametrize(
    ("at", "form", "value"), [(4, "I", 9), (8, "Q", 1 << 60), (16, "Q", 1 << 60)]
)
def test_a_gguf_header_that_lies_about_its_lengths_is_refused(tmp_path, at, form, value):
    content = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    struct.pack_into("<" + form, content, at, value)
    (tmp_path / "lie.gguf").write_bytes(content)
    with pytest.raises(BackendMisconfigured, match="model: "):
        load(tmp_path / "lie.gguf")
