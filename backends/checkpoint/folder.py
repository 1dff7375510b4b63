"""Write a checkpoint as a folder in Hugging Face form, for engines that read nothing else.

Weights are widened to float32, which loses nothing. The folder says which checkpoint it was made
of, so that engines that read either know each other's model as the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.checkpoint.huggingface import ORIGIN, HuggingFaceCheckpoint, Origin, long_name
from backends.checkpoint.spec import Checkpoint, ModelSpec, expected_tensors
from backends.errors import BackendMisconfigured

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"} | {
    "qwen3": "Qwen3ForCausalLM"
}


def write_folder(checkpoint: Checkpoint, folder: Path, beside: Mapping[str, bytes]) -> None:
    """Fill `folder` with configuration, weights, and the files `beside` them.

    Raises:
        BackendMisconfigured: it has files already, or cannot be written.
    """
    spec = checkpoint.spec
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BackendMisconfigured(f"{folder} is not empty")
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_bytes(_json(configuration(spec)))
        _write_weights(checkpoint, folder / "model.safetensors")
        written = HuggingFaceCheckpoint(folder)
        written.close()
        origin = Origin(folder=written.identity, identity=checkpoint.identity)
        (folder / ORIGIN).write_bytes(_json(origin))
    except OSError as error:
        raise BackendMisconfigured(f"{folder} cannot be written: {error.strerror}") from error


def configuration(spec: ModelSpec) -> dict[str, Any]:
    """What `config.json` says of such a model."""
    return {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.feed_forward,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": spec.norm_epsilon,
        "rope_theta": spec.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.qkv_bias and spec.family != "qwen2",
        "eos_token_id": list(spec.end_tokens),
        "torch_dtype": "float32",
    }


def _write_weights(checkpoint: Checkpoint, path: Path) -> None:
    spec = checkpoint.spec
    shapes = dict(expected_tensors(spec))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * 4
        entry = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
        header[long_name(name)] = entry
    text = _json(header)
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(_by_halves(name, checkpoint.tensor(name), spec).astype("<f4").tobytes())


def _by_halves(name: str, tensor: NDArray[Any], spec: ModelSpec) -> NDArray[Any]:
    """Rows of Q and K in the order in which RoPE pairs the two halves of a head."""
    heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}.get(name.split(".")[-2], 0)
    if spec.pairing == "half" or not heads:
        return tensor
    pairs = tensor.reshape(heads, spec.head_dim // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def _json(content: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1)
