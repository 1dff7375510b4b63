"""The nouns of the data plane: how a pool is cut, and where a handoff may be written.

Nothing here moves a byte or knows an accelerator; `plan.py` compares two layouts.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from math import prod
from typing import Annotated, Literal, cast

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]

DType = Literal["float32", "float16", "bfloat16"]
Axis = Literal["layer", "kv", "block", "head", "token", "dim"]

AXES: frozenset[str] = frozenset({"layer", "kv", "block", "head", "token", "dim"})
ITEM_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """How one worker cuts its pool into blocks, precisely enough for a stranger to read it.

    The pool is one array whose dimensions `axes` names, outermost first; `block` is the block
    number, `token` the place inside a block, `kv` is K then V. A bar, as in
    `"layer kv | block token head dim"`, says that the array lies in pieces: for each combination
    of the dimensions before it there is one *region*, contiguous in itself, and they are numbered
    in order. Without a bar there is one region. Offsets count through all regions as if they lay
    one after the other; `pool.py` knows where they really are.

    `model` identifies the checkpoint (architecture, RoPE parameters, vocabulary, original
    weights); two pools of unlike `model` never meet. `weights` says how this engine's copy of
    them is kept ("float32", "bfloat16", "q4_1", ...).
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    weights: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    dtype: DType
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)]
    rope: Literal["half", "interleaved"]
    axes: Annotated[str, msgspec.Meta(max_length=64)] = "block layer kv head token dim"

    def __post_init__(self) -> None:
        words = self.axes.replace("|", " ").split()
        if len(words) != len(AXES) or set(words) != AXES:
            raise ValueError(
                f"axes must name each of {sorted(AXES)} once, outermost first; got {self.axes!r}"
            )
        before, *after = self.axes.split("|")
        if len(after) > 1 or (after and not before.split()) or words[-1] != "dim":
            raise ValueError(
                f"axes may have one bar, between two of them, and end in dim; got {self.axes!r}"
            )
        if after and not after[0].split():
            raise ValueError(f"a region must hold at least dim; got {self.axes!r}")

    @cached_property
    def order(self) -> tuple[Axis, ...]:
        """The axes, outermost first, without the bar."""
        return cast("tuple[Axis, ...]", tuple(self.axes.replace("|", " ").split()))

    @cached_property
    def apart(self) -> tuple[Axis, ...]:
        """The axes before the bar: each combination of them is a region. None without a bar."""
        before, bar, _ = self.axes.partition("|")
        return cast("tuple[Axis, ...]", tuple(before.split())) if bar else ()

    def regions(self, pool_blocks: int) -> int:
        """Regions of a pool of `pool_blocks` blocks, all of one size."""
        sizes = self.sizes(pool_blocks)
        return prod(sizes[axis] for axis in self.apart)

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's KV takes over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes over all layers."""
        return self.token_bytes * self.block_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that are equal exactly when the layouts are."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def sizes(self, pool_blocks: int) -> dict[str, int]:
        """The length of each axis in a pool of `pool_blocks` blocks, in the order of `axes`."""
        lengths: dict[str, int] = {
            "layer": self.layers,
            "kv": 2,
            "block": pool_blocks,
            "head": self.kv_heads,
            "token": self.block_tokens,
            "dim": self.head_dim,
        }
        return {axis: lengths[axis] for axis in self.order}


class Epoch(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Who holds a right, in order of time: the worker's start, then its count of rights given."""

    incarnation: Natural
    counter: Natural


class Endpoint(msgspec.Struct, frozen=True):
    """Where a transport can be reached: `tcp` with `host:port`, `memory` with a name."""

    transport: Annotated[str, msgspec.Meta(max_length=32)]
    address: Annotated[str, msgspec.Meta(max_length=512)]


class Landing(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that a decode worker has set aside for one handoff, and the right to write there.

    `blocks` hold `tokens` tokens in their order. `secret` is random, known only to those who
    were given the landing, and shown with every write. `lease_seconds` counts from the moment
    the landing was granted or last written to.
    """

    id: Annotated[str, msgspec.Meta(max_length=64)]
    epoch: Epoch
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    worker: Annotated[str, msgspec.Meta(max_length=128)]
    endpoints: tuple[Endpoint, ...]
    layout: KVLayout
    pool_blocks: Positive
    blocks: tuple[Natural, ...]
    tokens: Positive
    lease_seconds: float
