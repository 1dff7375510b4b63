"""What is moved: shapes of real models, paged as after real allocation, and how it is checked."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.layout import DType, KVLayout

SEED = 20261126
SLACK = 1.25
"""Pools are larger than the prefix by this factor, and its blocks are strewn over all of it."""

TOKEN_MAJOR = "layer kv block token head dim"
BLOCK_MAJOR = "block layer kv token head dim"
HEAD_MAJOR = "block layer kv head token dim"

Kind = Literal["equal", "in order", "regrouped", "unequal", "cast"]
Runs = NDArray[np.int64]


class Shape(msgspec.Struct, frozen=True):
    """The KV of one model."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType


SMOL = Shape("SmolLM2-135M", 30, 3, 64, "float16")
LLAMA = Shape("Llama-3-8B", 32, 8, 128, "bfloat16")


class Case(msgspec.Struct, frozen=True):
    """A prefix of `tokens` tokens, from one pool to another.

    `equal`: both token-major with blocks of 16. `in order`: the same, in neighbouring blocks.
    `regrouped`: 32 token-major to 16 block-major, which leaves runs of some kilobytes together.
    `unequal`: as two workers are configured by default, 32 token-major to 16 head-major.
    `cast`: the same, and to the other 16-bit float.
    """

    shape: Shape
    tokens: int
    kind: Kind

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shape.name}, {self.tokens} tokens, {self.kind}"

    @property
    def source(self) -> KVLayout:
        """The layout of the sending pool."""
        return self._layout(16 if self.alike else 32, TOKEN_MAJOR, self.shape.dtype)

    @property
    def target(self) -> KVLayout:
        """The layout of the receiving pool."""
        other: DType = "bfloat16" if self.shape.dtype == "float16" else "float16"
        dtype = other if self.kind == "cast" else self.shape.dtype
        unlike = BLOCK_MAJOR if self.kind == "regrouped" else HEAD_MAJOR
        return self._layout(16, TOKEN_MAJOR if self.alike else unlike, dtype)

    @property
    def alike(self) -> bool:
        """Whether both pools are cut the same."""
        return self.kind in ("equal", "in order")

    @property
    def permuted(self) -> bool:
        """Whether numbers change their places and nothing else."""
        return self.kind in ("regrouped", "unequal")

    @property
    def size(self) -> int:
        """Bytes that are moved."""
        return self.tokens * self.target.token_bytes

    def blocks(self, layout: KVLayout, salt: int) -> tuple[int, ...]:
        """The prefix's blocks in a pool of `layout`."""
        wanted = layout.blocks_for(self.tokens)
        if self.kind == "in order":
            return tuple(range(wanted))
        random = np.random.default_rng(SEED + salt)
        return tuple(random.permutation(self.pool_blocks(layout))[:wanted].tolist())

    def pool_blocks(self, layout: KVLayout) -> int:
        """Blocks in a pool of `layout`."""
        return math.ceil(layout.blocks_for(self.tokens) * SLACK) + 1

    def pool_bytes(self, layout: KVLayout) -> int:
        """The size of a pool of `layout`."""
        return self.pool_blocks(layout) * layout.block_bytes

    @property
    def source_blocks(self) -> tuple[int, ...]:
        """Where the prefix lies in the sending pool."""
        return self.blocks(self.source, 1)

    @property
    def target_blocks(self) -> tuple[int, ...]:
        """Where it shall lie in the receiving pool."""
        return self.blocks(self.target, 2)

    def runs(self) -> Runs:
        """The moved bytes as runs `(source offset, target offset, length)`, as long as they get.

        For whoever does not convert: both pools have the target's layout.
        """
        layout, pool_blocks = self.target, self.pool_blocks(self.target)
        here = _rows(layout, pool_blocks, self.blocks(layout, 1), self.tokens)
        there = _rows(layout, pool_blocks, self.target_blocks, self.tokens)
        order = np.argsort(there)
        return _merged(here[order], there[order], layout.head_dim * layout.item_bytes)

    def _layout(self, block_tokens: int, axes: str, dtype: DType) -> KVLayout:
        return KVLayout(
            model=self.shape.name,
            weights="bench",
            layers=self.shape.layers,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            dtype=dtype,
            block_tokens=block_tokens,
            rope="half",
            axes=axes,
        )


def _rows(layout: KVLayout, pool_blocks: int, blocks: tuple[int, ...], tokens: int) -> Runs:
    """Byte offsets of every head's vector of every token, in canonical order."""
    apart, step = {}, layout.item_bytes
    sizes = layout.sizes(pool_blocks)
    for axis, size in reversed(sizes.items()):
        apart[axis], step = step, step * size
    block, within = np.divmod(np.arange(tokens), layout.block_tokens)
    token = np.asarray(blocks)[block] * apart["block"] + within * apart["token"]
    layer, kv, head = (np.arange(sizes[axis]) * apart[axis] for axis in ("layer", "kv", "head"))
    rows: Runs = (layer[:, None, None, None] + kv[:, None, None] + token[:, None] + head).reshape(
        -1
    )
    return rows


def _merged(here: Runs, there: Runs, length: int) -> Runs:
    """Neighbours on both sides become one run."""
    first = np.flatnonzero(
        (np.diff(here, prepend=here[0] - 2 * length) != length)
        | (np.diff(there, prepend=there[0] - 2 * length) != length)
    )
    counts = np.diff(first, append=len(here))
    return np.stack([here[first], there[first], counts * length], axis=1)


def pattern(first: int, count: int) -> NDArray[np.uint16]:
    """What a source pool holds: `count` words from word `first` on, finite in any 16-bit float."""
    at = np.arange(first, first + count, dtype=np.uint64)
    at = (at + (at >> np.uint64(13))) * np.uint64(40503)
    return (at & np.uint64(0x3BFF)).astype(np.uint16)


def fill(pool: NDArray[np.uint8]) -> None:
    """Write the pattern into a source pool."""
    words = pool.view(np.uint16)
    for first in range(0, len(words), 1 << 22):
        words[first : first + (1 << 22)] = pattern(first, min(1 << 22, len(words) - first))


def is_there(pool: NDArray[np.uint8], runs: Runs, sample: int = 512) -> bool:
    """Whether some of the runs, the first and the last among them, lie in a target pool."""
    some = np.unique(np.linspace(0, len(runs) - 1, sample).astype(int))
    return all(
        bool((pool[to : to + size].view(np.uint16) == pattern(start // 2, size // 2)).all())
        for start, to, size in runs[some].tolist()
    )
