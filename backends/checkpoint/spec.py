"""What a checkpoint says about its architecture, whichever file format said it.

Tensor names are those of GGUF (`blk.0.attn_q.weight`): shorter than Hugging Face's, and one
vocabulary is enough. `expected_tensors` lists every tensor a model must have, with its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.errors import BackendMisconfigured

Family = Literal["llama", "qwen2", "qwen3"]
Pairing = Literal["half", "interleaved"]

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3")
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20


class Llama3Scaling(msgspec.Struct, frozen=True):
    """How Llama 3.1 stretches low RoPE frequencies; the four numbers of its configuration."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes and constants of one decoder-only transformer.

    `pairing` says which dimensions of a head RoPE turns together, as the weights are stored:
    `i` with `i + head_dim / 2` ("half") or `2 i` with `2 i + 1` ("interleaved").
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context_tokens: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    pairing: Pairing
    end_tokens: tuple[int, ...]
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def qk_norm(self) -> bool:
        """Whether each head of Q and K is normalised before RoPE."""
        return self.family == "qwen3"

    def check(self) -> None:
        """Refuse shapes that no model of these families has.

        Raises:
            BackendMisconfigured: names the field.
        """
        for name, most in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise BackendMisconfigured(f"model: {name} must be 1 to {most}, is {value!r}")
        if self.heads % self.kv_heads:
            raise BackendMisconfigured(
                f"model: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise BackendMisconfigured(f"model: head_dim must be even, is {self.head_dim}")
        if any(not 0 <= token < self.vocabulary for token in self.end_tokens):
            raise BackendMisconfigured(
                f"model: end tokens {self.end_tokens} exceed the vocabulary of {self.vocabulary}"
            )


_BOUNDS: Mapping[str, int] = {
    "layers": MAX_LAYERS,
    "hidden": MAX_WIDTH,
    "heads": 4096,
    "kv_heads": 4096,
    "head_dim": 4096,
    "feed_forward": MAX_WIDTH,
    "vocabulary": 1 << 24,
    "context_tokens": 1 << 24,
}


class Checkpoint(Protocol):
    """An opened checkpoint: what it is, and its tensors one at a time."""

    spec: ModelSpec
    identity: str
    """Equal for every worker that opens the same checkpoint, whatever precision it computes in."""

    def names(self) -> frozenset[str]:
        """The tensors that are there, under their GGUF names."""

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor, dequantised, as an array of its own."""

    def close(self) -> None:
        """Close the files."""


def expected_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model of this shape: name and shape."""
    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield "token_embd.weight", (spec.vocabulary, spec.hidden)
    yield "output_norm.weight", (spec.hidden,)
    if not spec.tied:
        yield "output.weight", (spec.vocabulary, spec.hidden)
    for layer in range(spec.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (spec.hidden,)
        yield f"{block}.ffn_norm.weight", (spec.hidden,)
        for name, width in (("q", wide), ("k", narrow), ("v", narrow)):
            yield f"{block}.attn_{name}.weight", (width, spec.hidden)
            if spec.qkv_bias:
                yield f"{block}.attn_{name}.bias", (width,)
        if spec.qk_norm:
            yield f"{block}.attn_q_norm.weight", (spec.head_dim,)
            yield f"{block}.attn_k_norm.weight", (spec.head_dim,)
        yield f"{block}.attn_output.weight", (spec.hidden, wide)
        if spec.output_bias:
            yield f"{block}.attn_output.bias", (spec.hidden,)
        yield f"{block}.ffn_gate.weight", (spec.feed_forward, spec.hidden)
        yield f"{block}.ffn_up.weight", (spec.feed_forward, spec.hidden)
        yield f"{block}.ffn_down.weight", (spec.hidden, spec.feed_forward)


def check_names(spec: ModelSpec, present: frozenset[str]) -> None:
    """Refuse a checkpoint that lacks a tensor, or has one that this engine would ignore.

    Raises:
        BackendMisconfigured: names the first such tensor.
    """
    wanted = {name for name, _ in expected_tensors(spec)}
    if missing := sorted(wanted - present):
        raise BackendMisconfigured(f"model: the checkpoint lacks the tensor {missing[0]}")
    if extra := sorted(present - wanted):
        raise BackendMisconfigured(
            f"model: a {spec.family} model has no tensor {extra[0]}; this architecture is unknown"
        )
