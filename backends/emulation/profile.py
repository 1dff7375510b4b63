"""What an accelerator and a model are to the roofline: a handful of figures, each with its source.

Both are read from TOML files: profiles from `profiles/`, shapes from `shapes/`, or from a path.
A shape may also be the `config.json` of a model in Hugging Face form. `roofline.py` computes with
them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from backends.errors import BackendMisconfigured

Weights = Literal["float32", "bfloat16", "float16", "float8_e4m3", "int8", "int4"]

WEIGHT_BYTES: Mapping[Weights, float] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "int8": 1, "int4": 0.5625,
}  # fmt: skip
"""Bytes of one weight; `int4` with a 16-bit scale for each group of 32."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it is from: a publication, or "assumed" or "measured" and why or how."""

    value: Annotated[float, msgspec.Meta(ge=0, le=1e20)]
    source: Annotated[str, msgspec.Meta(min_length=1)]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator.

    `flops` are peak operations per second on dense matrices, by the dtype of the weights;
    `memory_bytes_per_second` is the peak rate of its memory, `link_bytes_per_second` that of its
    link to other machines in one direction. Of those peaks, `flops_efficiency`,
    `memory_efficiency` and `link_efficiency` are had. `memory_usable` is the part of the memory
    that weights and KV may fill. A step takes at least `step_seconds`, and each layer
    `layer_seconds`, whatever is computed. Several such devices that hold one model between them
    exchange results twice in a layer, which takes `exchange_seconds` each time.
    """

    name: str
    flops: dict[Weights, Figure]
    memory_bytes: Figure
    memory_bytes_per_second: Figure
    link_bytes_per_second: Figure
    flops_efficiency: Figure
    memory_efficiency: Figure
    link_efficiency: Figure
    memory_usable: Figure
    step_seconds: Figure
    layer_seconds: Figure
    exchange_seconds: Figure

    def __post_init__(self) -> None:
        rates = {"memory_bytes_per_second", "memory_bytes", "link_bytes_per_second"}
        parts = {"flops_efficiency", "memory_efficiency", "link_efficiency", "memory_usable"}
        for name in rates | parts:
            if getattr(self, name).value <= 0:
                raise ValueError(f"{name}: must be more than 0")
        for name in parts:
            if getattr(self, name).value > 1:
                raise ValueError(f"{name}: is a part, 1 at most")
        if any(figure.value <= 0 for figure in self.flops.values()):
            raise ValueError("flops: must be more than 0")


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sizes of a dense transformer with gated feed-forward layers, whatever its weights are."""

    source: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    feed_forward: Count
    vocabulary: Count
    context_tokens: Count
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        return self.hidden * (attention + 3 * self.feed_forward)

    @property
    def head_weights(self) -> int:
        """Numbers in the matrix that makes logits."""
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        """Numbers in all matrices; norms and biases are left out."""
        return self.layers * self.layer_weights + self.head_weights * (1 if self.tied else 2)

    @property
    def kv_numbers(self) -> int:
        """Numbers of K and V that one token leaves."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def load_profile(name: str) -> Profile:
    """A profile of `profiles/` by its name, or one from a TOML file.

    Raises:
        BackendMisconfigured: there is none, or what is wrong in it.
    """
    return _convert("profile", name, _read("profile", "profiles", name), Profile)


def load_shape(name: str) -> Shape:
    """A shape of `shapes/` by its name, from a TOML file, or from a model's `config.json`.

    Raises:
        BackendMisconfigured: there is none, or what is wrong in it.
    """
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        return _convert("model_shape", name, _read("model_shape", "shapes", name), Shape)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BackendMisconfigured(f"model_shape: cannot read {path}: {error}") from None
    return _convert("model_shape", name, _from_config(path, content), Shape)


def names(kind: Literal["profiles", "shapes"]) -> list[str]:
    """Those that come along."""
    return sorted(path.stem for path in (Path(__file__).parent / kind).glob("*.toml"))


def _read(option: str, kind: Literal["profiles", "shapes"], name: str) -> dict[str, Any]:
    known = names(kind)
    path = Path(__file__).parent / kind / f"{name}.toml"
    if name not in known:
        path = Path(name).expanduser()
        if path.suffix != ".toml" or not path.is_file():
            raise BackendMisconfigured(
                f"{option}: {name!r} is neither a TOML file nor one of {', '.join(known)}"
            )
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BackendMisconfigured(f"{option}: cannot read {path}: {error}") from None


_CONFIG = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "vocabulary": "vocab_size",
    "context_tokens": "max_position_embeddings",
}


def _from_config(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise BackendMisconfigured(f"model_shape: {path} must hold a JSON object")
    missing = [key for key in _CONFIG.values() if not isinstance(content.get(key), int)]
    if missing:
        raise BackendMisconfigured(f"model_shape: {path} lacks {missing[0]}, or it is no number")
    fields = {name: content[key] for name, key in _CONFIG.items()}
    return {
        **fields,
        "source": str(path),
        "kv_heads": content.get("num_key_value_heads", fields["heads"]),
        "head_dim": content.get("head_dim") or fields["hidden"] // max(1, fields["heads"]),
        "tied": bool(content.get("tie_word_embeddings", False)),
    }


_T = TypeVar("_T")


def _convert(option: str, name: str, content: Any, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise BackendMisconfigured(f"{option}: {name}: {error}") from None
