"""Where the rows of a prefix lie in a pool, as arrays of numbers.

A row is a contiguous run over a layout's innermost axes; a pool is then a table of rows, and
gathering a prefix in any order is one indexed copy. Knows neither what the numbers mean nor
where they go.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.layout import Axis, KVLayout

Rows = NDArray[np.int64]
Words = NDArray[Any]

MAX_POOL_BYTES = 1 << 62
"""Beyond this, places would not fit into 64 bits."""

WORD: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}


def table(pool: Any, layout: KVLayout, pool_blocks: int, inner: tuple[Axis, ...]) -> Words:
    """The whole pool as a table of rows, without copying; numbers appear as unsigned words.

    Raises:
        ValueError: the buffer's length is not that of `pool_blocks` blocks.
    """
    flat = np.frombuffer(pool, dtype=np.uint8)
    if flat.size != pool_blocks * layout.block_bytes:
        raise ValueError(
            f"pool: {flat.size} bytes are not {pool_blocks} blocks of {layout.block_bytes}"
        )
    return flat.view(WORD[layout.item_bytes]).reshape(-1, row_items(layout, inner))


def row_items(layout: KVLayout, inner: Iterable[Axis]) -> int:
    """Numbers in one row over the axes `inner`."""
    sizes = layout.sizes(1)
    return prod(sizes[axis] for axis in inner)


def strides(layout: KVLayout, pool_blocks: int) -> dict[str, int]:
    """How many numbers apart two neighbours along each axis lie."""
    apart: dict[str, int] = {}
    step = 1
    for axis, size in reversed(layout.sizes(pool_blocks).items()):
        apart[axis] = step
        step *= size
    return apart


class Addresses:
    """Row numbers of one prefix in one pool, layer 0.

    `layer_rows` leads to the same row of the next layer, and at every multiple of `wrap_rows` a
    new round over all blocks begins.
    """

    def __init__(
        self,
        layout: KVLayout,
        pool_blocks: int,
        blocks: tuple[int, ...],
        tokens: int,
        inner: tuple[Axis, ...],
    ) -> None:
        """Take note of where the prefix lies.

        Raises:
            ValueError: the blocks are too few for the tokens, or not all of the pool.
        """
        if pool_blocks * layout.block_bytes >= MAX_POOL_BYTES:
            raise ValueError(f"pool_blocks: {pool_blocks} is more than memory can hold")
        self._layout = layout
        self._blocks = np.asarray(blocks, dtype=np.int64)
        if len(blocks) < layout.blocks_for(tokens):
            raise ValueError(f"blocks: {len(blocks)} do not hold {tokens} tokens")
        if len(blocks) and not 0 <= self._blocks.min() <= self._blocks.max() < pool_blocks:
            raise ValueError(f"blocks: not all of them are in a pool of {pool_blocks}")
        items = row_items(layout, inner)
        apart = strides(layout, pool_blocks)
        self._apart = {axis: apart[axis] // items for axis in ("block", "token")}
        self.layer_rows = apart["layer"] // items
        self.wrap_rows = self._apart["block"] * pool_blocks
        self._kv = _steps(1 if "kv" in inner else 2, apart["kv"] // items)
        self._head = _steps(1 if "head" in inner else layout.kv_heads, apart["head"] // items)

    @property
    def rows_per_token(self) -> int:
        """Rows that one token has in one layer."""
        return len(self._kv) * len(self._head)

    def rows(self, start: int, end: int) -> Rows:
        """Row numbers of tokens `start` to `end`, of shape (K and V, tokens, heads).

        An axis that lies within a row has length 1.
        """
        block, within = np.divmod(np.arange(start, end), self._layout.block_tokens)
        token = self._blocks[block] * self._apart["block"] + within * self._apart["token"]
        rows: Rows = self._kv[:, None, None] + token[None, :, None] + self._head[None, None, :]
        return rows


def _steps(count: int, step: int) -> Rows:
    return np.arange(count, dtype=np.int64) * step


def scatter(data: Any, pool: NDArray[np.uint8], offsets: Rows, lengths: Rows) -> None:
    """Write `data`, which is runs one after the other, to where they belong, in one copy."""
    unit = int(np.gcd.reduce(np.concatenate([offsets, lengths, [pool.size]])))
    counts = lengths // unit
    before = np.cumsum(counts) - counts
    index = np.repeat(offsets // unit - before, counts) + np.arange(int(counts.sum()))
    kind = np.dtype(f"V{unit}")
    pool.view(kind)[index] = np.frombuffer(data, dtype=kind)
