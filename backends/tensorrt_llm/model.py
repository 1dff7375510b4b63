"""What the files of a model say of it, without its weights where that is possible."""

from __future__ import annotations

from pathlib import Path

from backends.checkpoint.huggingface import read_json, read_spec
from backends.checkpoint.opening import open_checkpoint
from backends.checkpoint.spec import ModelSpec
from backends.errors import BackendMisconfigured

QUANTIZATION = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt writes how a checkpoint was quantised."""


def spec_of(path: Path) -> ModelSpec:
    """Its architecture.

    Raises:
        BackendMisconfigured: it is none that we know, or its KV has scales of its own.
    """
    if not path.is_dir():
        raise BackendMisconfigured("model: TensorRT-LLM needs a folder in Hugging Face form")
    spec = read_spec(path)
    spec.check()
    if _quantization(path).get("kv_cache_quant_algo"):
        raise BackendMisconfigured(
            f"model: {QUANTIZATION} gives KV scales of its own, which no other engine is told of"
        )
    return spec


def identity_of(path: Path) -> str:
    """How all workers that have this checkpoint call it.

    Raises:
        BackendMisconfigured: its weights are of a kind that only TensorRT-LLM reads.
    """
    try:
        checkpoint = open_checkpoint(path)
    except BackendMisconfigured as error:
        raise BackendMisconfigured(
            f"identity: say how other workers call this model, as its own files cannot be read"
            f" here ({error})"
        ) from error
    checkpoint.close()
    return checkpoint.identity


def weights_of(path: Path, dtype: str) -> str:
    """How this engine's copy of the weights is kept."""
    algorithm = _quantization(path).get("quant_algo")
    if algorithm:
        return str(algorithm).lower()
    if dtype != "auto":
        return dtype
    config = read_json(path / "config.json")
    return str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")


def _quantization(path: Path) -> dict[str, object]:
    file = path / QUANTIZATION
    found = read_json(file).get("quantization", {}) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
