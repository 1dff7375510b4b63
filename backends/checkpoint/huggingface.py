"""Open a model folder in Hugging Face form: `config.json` and `*.safetensors`.

Knows Llama, Qwen2 and Qwen3. What `config.json` asks for and this engine does not do is
refused with the name of its field, never ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.checkpoint.safetensors_file import SafetensorsFile
from backends.checkpoint.spec import FAMILIES, Llama3Scaling, ModelSpec, check_names
from backends.errors import BackendMisconfigured

_SAMPLE = 4096
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_LONG_TOP = {short: long for long, short in _TOP.items()}
_LONG_IN_LAYER = {short: long for long, short in _IN_LAYER.items()}

ORIGIN = "baton-origin.json"
"""In a folder that was made of another checkpoint: which one that was."""


class Origin(msgspec.Struct, frozen=True):
    """The identities of the folder itself, and of the checkpoint that it was made of."""

    folder: str
    identity: str


class HuggingFaceCheckpoint:
    """One folder, its shards mapped into memory. Q and K rows pair for RoPE by halves."""

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "config.json")
        self._files = ExitStack()
        try:
            self._tensors = _open_shards(folder, self._files)
            self.spec = _spec(config, _end_tokens(folder, config), self.names())
            self.spec.check()
            if self.spec.tied:
                self._tensors.pop("output.weight", None)
            check_names(self.spec, self.names())
            self.identity = _original(folder, self._identify(folder))
        except BaseException:
            self._files.close()
            raise

    def names(self) -> frozenset[str]:
        """The tensors that are there, under their GGUF names."""
        return frozenset(self._tensors)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32."""
        shard, stored = self._tensors[name]
        return shard.tensor(stored)

    def close(self) -> None:
        """Close every shard."""
        self._files.close()

    def _identify(self, folder: Path) -> str:
        """Hash architecture, vocabulary, and a sample of each tensor's bytes."""
        digest = hashlib.sha256(msgspec.msgpack.encode(self.spec))
        tokenizer = folder / "tokenizer.json"
        if tokenizer.is_file():
            digest.update(hashlib.sha256(tokenizer.read_bytes()).digest())
        for name in sorted(self._tensors):
            shard, stored = self._tensors[name]
            flat = shard.raw(stored)
            digest.update(f"{name} {len(flat)}".encode())
            middle = max(0, (len(flat) - _SAMPLE) // 2)
            for part in (flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]):
                digest.update(part.tobytes())
        return f"{self.spec.family}-{self.spec.layers}x{self.spec.hidden}-{digest.hexdigest()[:32]}"


def _original(folder: Path, identity: str) -> str:
    """Whose copy the folder is, unless it was changed since; otherwise itself."""
    path = folder / ORIGIN
    if not path.is_file():
        return identity
    try:
        origin = msgspec.convert(read_json(path), Origin)
    except msgspec.ValidationError as error:
        raise BackendMisconfigured(f"model: {path}: {error}") from None
    return origin.identity if origin.folder == identity else identity


def read_spec(folder: Path) -> ModelSpec:
    """The architecture of the model in `folder`, whose weights need not be there.

    Raises:
        BackendMisconfigured: names what in `config.json` is not supported.
    """
    config = read_json(folder / "config.json")
    untied = frozenset({"output.weight"})
    return _spec(config, _end_tokens(folder, config), untied)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        BackendMisconfigured: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BackendMisconfigured(f"model: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise BackendMisconfigured(f"model: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BackendMisconfigured(f"model: {path} must hold a JSON object")
    return content


def _open_shards(folder: Path, files: ExitStack) -> dict[str, tuple[SafetensorsFile, str]]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BackendMisconfigured(f"model: {index} lacks weight_map")
        shards = sorted({str(name) for name in weight_map.values()})
    else:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        raise BackendMisconfigured(f"model: {folder} holds no .safetensors file")
    tensors = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise BackendMisconfigured(f"model: weight_map names {shard!r} outside the folder")
        try:
            opened = files.enter_context(closing(SafetensorsFile(folder / shard)))
        except OSError as error:
            raise BackendMisconfigured(f"model: cannot read {folder / shard}: {error}") from None
        for stored in opened.names():
            if not stored.endswith("rotary_emb.inv_freq"):
                tensors[_short_name(stored)] = (opened, stored)
    return tensors


def _short_name(stored: str) -> str:
    if stored in _TOP:
        return _TOP[stored]
    parts = stored.split(".")
    short = _IN_LAYER.get(".".join(parts[3:-1]))
    if parts[:2] == ["model", "layers"] and short:
        return f"blk.{parts[2]}.{short}.{parts[-1]}"
    return stored


def long_name(short: str) -> str:
    """What a tensor with this GGUF name is called here."""
    if short in _LONG_TOP:
        return _LONG_TOP[short]
    _, layer, part, kind = short.split(".")
    return f"model.layers.{layer}.{_LONG_IN_LAYER[part]}.{kind}"


def _end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """`generation_config.json` knows best: chat models end at more tokens than their base."""
    found = config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        found = read_json(generation).get("eos_token_id", found)
    if found is None:
        return ()
    tokens = found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) for token in tokens):
        raise BackendMisconfigured(f"model: eos_token_id must be token ids, is {found!r}")
    return tuple(sorted(set(tokens)))


def _refuse(config: Mapping[str, Any]) -> None:
    for field, accepted in _ONLY.items():
        value = config.get(field, accepted[0])
        if value not in accepted:
            raise BackendMisconfigured(f"model: {field} {value!r} in config.json is not supported")
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        raise BackendMisconfigured("model: layer_types other than full_attention are not supported")


_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
}


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """RoPE's base and scaling, in the older form of `config.json` or the newer."""
    newer = config.get("rope_parameters")
    name = "rope_parameters" if newer else "rope_scaling"
    scaling = newer or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise BackendMisconfigured(f"model: {name} {kind!r} in config.json is not supported")
    try:
        return float(theta), Llama3Scaling(
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise BackendMisconfigured(f"model: {name} in config.json lacks {error}") from None


def _spec(
    config: Mapping[str, Any], end_tokens: tuple[int, ...], names: frozenset[str]
) -> ModelSpec:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BackendMisconfigured(
            f"model: model_type is {family!r}; known are {', '.join(FAMILIES)}"
        )
    _refuse(config)
    theta, scaling = _rope(config)

    def field(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int):
            raise BackendMisconfigured(f"model: {name} in config.json must be a whole number")
        return value

    heads, hidden = field("num_attention_heads"), field("hidden_size")
    bias = bool(config.get("attention_bias", False))
    tied = bool(config.get("tie_word_embeddings", False))
    return ModelSpec(
        family=family,
        layers=field("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=field("num_key_value_heads", heads),
        head_dim=field("head_dim", hidden // max(1, heads)),
        feed_forward=field("intermediate_size"),
        vocabulary=field("vocab_size"),
        context_tokens=field("max_position_embeddings"),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        pairing="half",
        end_tokens=end_tokens,
        tied=tied or "output.weight" not in names,
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family == "llama",
    )
