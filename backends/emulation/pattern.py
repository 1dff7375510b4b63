"""The KV that the synthetic backend writes: a function of the tokens up to each position.

A position's *state* is a 64-bit sum over keyed hashes of its prefix. Each number in the pool is
a whole number below 256, so that it survives every conversion between dtypes; the first eight
of layer 0, K, head 0 spell the state, from which the next position is computed.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.api import Row
from transfer.layout import KVLayout

U64 = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
STATE_BYTES = 8
CANONICAL = ("block", "token", "layer", "kv", "head", "dim")
CHECKED_AT_ONCE = 256  # positions; bounds the memory of a check


def mix(values: U64) -> U64:
    """splitmix64's finalizer, element by element (Steele, Lea and Flood, 2014)."""
    mixed = values + GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def prefix_states(tokens: U64, start: int, before: int) -> U64:
    """The state at each of `tokens`, the first at position `start` with `before` before it."""
    places = np.arange(start, start + len(tokens), dtype=np.uint64)
    return np.cumsum(mix(tokens ^ mix(places)), dtype=np.uint64) + np.uint64(before)


class Places(msgspec.Struct, frozen=True):
    """The positions of a step: where each lies, and the bytes of its state."""

    blocks: NDArray[np.int64]
    offsets: NDArray[np.int64]
    states: NDArray[np.uint8]


class Pattern:
    """Writes, reads and checks the KV of positions in one pool."""

    def __init__(self, layout: KVLayout, pool: NDArray[np.uint8], pool_blocks: int) -> None:
        self._block_tokens = layout.block_tokens
        words = layout.axes.split()
        bits: Any = np.uint32 if layout.dtype == "float32" else np.uint16
        shaped = pool.view(bits).reshape(tuple(layout.sizes(pool_blocks).values()))
        self._view = shaped.transpose([words.index(axis) for axis in CANONICAL])
        self._codes, self._numbers = _tables(layout.dtype)
        self._repeat = np.arange(layout.head_dim) % STATE_BYTES
        shape = (layout.layers, 2, layout.kv_heads, layout.head_dim)
        key = mix(np.arange(np.prod(shape), dtype=np.uint64)).astype(np.uint8).reshape(shape)
        key[0, 0, 0] = 0
        self._key = key

    def place(self, batch: Items[Row]) -> Places:
        """Find the places of a batch, in no particular order, and compute their states.

        Raises:
            IndexError: a table does not cover a row, or names a block that there is not.
        """
        parts = [self._place_chunk(row) for row in batch if len(row.tokens) > 1]
        singles = [row for row in batch if len(row.tokens) == 1]
        if singles:
            parts.append(self._place_singles(singles))
        blocks, offsets, states = (np.concatenate(column) for column in zip(*parts, strict=True))
        if blocks.min() < 0 or blocks.max() >= len(self._view):
            raise IndexError(f"blocks are numbered 0 to {len(self._view) - 1}")
        return Places(blocks, offsets, states.view(np.uint8).reshape(-1, STATE_BYTES))

    def write(self, places: Places, layer: int | None = None) -> None:
        """Write the positions' numbers, in one layer or in all."""
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        numbers = self._numbers_at(places.states, layers)
        self._view[places.blocks, places.offsets, layers] = self._codes.take(numbers)

    def copy(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy the first block of each pair to the second."""
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self._view[list(targets)] = self._view[list(sources)]

    def first_difference(self, prefix: list[int], table: list[int]) -> tuple[int, int] | None:
        """Position and layer of the first number that is not what `prefix` says."""
        states = prefix_states(np.array(prefix, np.uint64), 0, 0)
        for start in range(0, len(prefix), CHECKED_AT_ONCE):
            some = states[start : start + CHECKED_AT_ONCE]
            positions = np.arange(start, start + len(some))
            blocks = np.array(table)[positions // self._block_tokens]
            expected = self._codes[
                self._numbers_at(some.view(np.uint8).reshape(-1, STATE_BYTES), slice(None))
            ]
            found = self._view[blocks, positions % self._block_tokens]
            wrong = np.argwhere((found != expected).any(axis=(2, 3, 4)))
            if len(wrong):
                return start + int(wrong[0][0]), int(wrong[0][1])
        return None

    def _numbers_at(self, states: NDArray[np.uint8], layers: slice) -> NDArray[np.uint8]:
        return states[:, self._repeat][:, None, None, None, :] ^ self._key[layers]

    def _place_chunk(self, row: Row) -> tuple[NDArray[np.int64], NDArray[np.int64], U64]:
        before = 0
        if row.start:
            block, offset = divmod(row.start - 1, self._block_tokens)
            before = int(self._states_at([row.blocks[block]], [offset])[0])
        states = prefix_states(np.array(row.tokens, np.uint64), row.start, before)
        positions = np.arange(row.start, row.start + len(row.tokens))
        blocks = np.array(row.blocks)[positions // self._block_tokens]
        return blocks, positions % self._block_tokens, states

    def _place_singles(self, rows: list[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64], U64]:
        size = self._block_tokens
        starts = np.array([row.start for row in rows])
        tokens = np.array([row.tokens[0] for row in rows], np.uint64)
        blocks = np.array([row.blocks[row.start // size] for row in rows])
        previous = np.maximum(starts - 1, 0)
        places = zip(rows, (previous // size).tolist(), strict=True)
        held = np.array([row.blocks[place] for row, place in places])
        before = np.where(starts > 0, self._states_at(held, previous % size), np.uint64(0))
        return blocks, starts % size, before + mix(tokens ^ mix(starts.astype(np.uint64)))

    def _states_at(self, blocks: Any, offsets: Any) -> U64:
        codes = self._view[blocks, offsets, 0, 0, 0, :STATE_BYTES]
        if codes.itemsize == 4:
            codes = codes >> np.uint32(16)
        states: U64 = np.ascontiguousarray(self._numbers[codes]).view(np.uint64)[:, 0]
        return states


def _tables(dtype: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The bits of 0..255 in `dtype`, and what the upper 16 of such bits stand for."""
    whole = np.arange(256, dtype=np.float32)
    wide = whole.view(np.uint32)
    if dtype == "float16":
        codes: NDArray[Any] = whole.astype(np.float16).view(np.uint16)
        keys = codes
    else:
        keys = (wide >> 16).astype(np.uint16)  # exact: such numbers have 8 significant bits
        codes = wide if dtype == "float32" else keys
    numbers = np.zeros(1 << 16, np.uint8)
    numbers[keys] = np.arange(256)
    return codes, numbers
