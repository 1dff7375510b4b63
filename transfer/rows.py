"""Where the rows of a prefix lie, and how to walk from one pool's to another's.

A *row* is a run over a layout's innermost axes, contiguous on both sides; a *strip* is a few rows
whose distance is constant on either side; a *walk* is all strips of a slice, in the order of the
target. It is the same for every layer but for a constant, so it is made for layer 0 and kept.
Knows neither what the numbers mean nor where memory is: all offsets are bytes (or places, see
`digest.py`) in a flat, virtual array.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from transfer.kernels import copy_runs
from transfer.layout import Axis, KVLayout, Order
from transfer.walking import BLOCK, COUNT, HEAD, I64, KV, TARGET, find_runs, lay_out

MAX_POOL_BYTES = 1 << 62
"""Beyond this, places would not fit into 64 bits."""

STRIP_BYTES = 1 << 20
"""The most that one strip holds, unless a single row is more."""


NUMBERED = {"block": BLOCK, "kv": KV, "head": HEAD}
NO_BLOCKS: I64 = np.zeros(0, np.int64)
KEPT_STRIPS = 1 << 18
"""Walks are kept up to so many strips; each takes 48 bytes, and as much again for its runs."""


def strides(layout: KVLayout, pool_blocks: int) -> dict[str, int]:
    """How many numbers apart two neighbours along each axis lie."""
    numbers = layout.tables(pool_blocks)[0]
    return {axis: step // numbers.item_bytes for axis, step in numbers.strides.items()}


class Side(msgspec.Struct, frozen=True, eq=False):
    """How one prefix lies in a flat array: in `blocks` of `block_tokens` tokens each.

    `order` are the array's axes and `step` how far apart neighbours along each of them are;
    `origin` is where the first head lies that is of interest. At every multiple of `wrap` a new
    round over all blocks begins, at every multiple of `region` a new region: what lies on either
    side is not one run.
    """

    order: Order
    step: Mapping[str, int]
    origin: int
    blocks: I64
    block_tokens: int
    wrap: int
    region: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """What `walking.lay_out` wants to know, but for the blocks."""
        steps = (self.along(it) for it in ("block", "token", "kv", "head"))
        return self.block_tokens, *steps, self.origin

    def along(self, axis: str) -> int:
        """How far apart neighbours along `axis` are; 0 if the array has no such axis."""
        return self.step.get(axis, 0)


def sides(
    layout: KVLayout, pool_blocks: int, blocks: tuple[int, ...], tokens: int, first_head: int
) -> tuple[Side, ...]:
    """Where `tokens` tokens in `blocks` of a pool lie, from a head on: numbers, perhaps scales.

    Raises:
        ValueError: the blocks are too few for the tokens, or not all of the pool.
    """
    if pool_blocks * layout.block_bytes >= MAX_POOL_BYTES:
        raise ValueError(f"pool_blocks: {pool_blocks} is more than memory can hold")
    if len(blocks) < layout.blocks_for(tokens):
        raise ValueError(f"blocks: {len(blocks)} do not hold {tokens} tokens")
    numbers = np.array(blocks, dtype=np.int64)
    if len(blocks) and not 0 <= min(blocks) <= max(blocks) < pool_blocks:
        raise ValueError(f"blocks: not all of them are in a pool of {pool_blocks}")
    made = []
    for table in layout.tables(pool_blocks):
        step = table.strides
        origin = (first_head - layout.heads.first) * step.get("head", 0)
        wrap, region = step["block"] * pool_blocks, table.nbytes // table.regions
        side = Side(table.order, step, origin, numbers, layout.block_tokens, wrap, region)
        made.append(side)
    return tuple(made)


class Walk(msgspec.Struct, frozen=True, eq=False, dict=True):
    """The strips of a slice in layer 0, in the order of the target.

    `strips` has a line for each, whose columns `walking.py` names, and `steps` says how far apart
    the rows of a strip are; `row_bytes` is a row's length, both at the source and at the target.
    """

    strips: I64
    steps: tuple[int, int, int, int]
    row_bytes: tuple[int, int]
    source: Side
    target: Side

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the target."""
        return int(self.strips[:, COUNT].sum()) * self.row_bytes[TARGET]

    @property
    def target_runs(self) -> tuple[I64, I64]:
        """Offsets and lengths of the longest runs that the walk makes of the target."""
        _, there, lengths = self._runs(both=False)
        return there, lengths

    @cached_property
    def runs(self) -> tuple[I64, I64, I64]:
        """Offsets at the source and at the target, and lengths, of what can be copied at once."""
        return self._runs(both=True)

    def _runs(self, *, both: bool) -> tuple[I64, I64, I64]:
        bounds = self.source.region, self.target.region, self.target.wrap
        found: tuple[I64, I64, I64] = find_runs(
            self.strips, self.steps[:2], self.row_bytes, bounds, both
        )
        return found


class Kind(msgspec.Struct, frozen=True, eq=False):
    """What a walk goes over: how many planes and heads, in rows over which axes, of what length.

    `scales` are where the source's and the target's scales of each row lie, where it has some.
    """

    counts: Mapping[str, int]
    inner: tuple[Axis, ...]
    row_bytes: tuple[int, int]
    scales: tuple[Side | None, Side | None] = (None, None)


class Walks:
    """The walks between two sides, each kept for the next layer, which usually asks the same."""

    def __init__(self, source: Side, target: Side, kind: Kind) -> None:
        """Go over what `kind` says."""
        self._made: dict[tuple[int, int], Walk] = {}
        self._strips = 0
        self._source, self._target = source, target
        self._row_bytes = kind.row_bytes
        counts = kind.counts
        order = [
            axis
            for axis in target.order.axes
            if axis != "layer" and axis not in kind.inner and counts.get(axis) != 1
        ]
        along: str = order[-1]  # along which strips lie, if rows are at constant distance there
        if along not in ("token", "head") or along in (*source.order.apart, *target.order.apart):
            along = "none"
        columns = (source, target, *kind.scales)
        steps = [side.along(along) if side is not None else 0 for side in columns]
        if along == "none":
            steps[:2] = kind.row_bytes
        self._steps = steps[0], steps[1], steps[2], steps[3]
        grids = source.block_tokens, target.block_tokens
        self._grids = (
            (*grids, max(1, STRIP_BYTES // max(kind.row_bytes))) if along == "token" else (1, 1, 1)
        )
        axes = [axis for axis in order if axis not in ("token", along)]
        self._axes = np.array([NUMBERED[axis] for axis in axes], np.int64)
        self._counts = np.array([counts.get(axis, 0) for axis in axes], np.int64)
        self._rows = counts.get(along, 1)
        self._sides = np.array(
            [(1,) * 6 if side is None else side.numbers for side in columns], np.int64
        )
        blocks = [NO_BLOCKS if side is None else side.blocks for side in columns]
        self._blocks = blocks[0], blocks[1], blocks[2], blocks[3]

    def over(self, start: int, end: int) -> Walk:
        """The walk over tokens `start` to `end`."""
        way = self._made.get((start, end))
        if way is None:
            way = self._make(start, end)
            self._strips += len(way.strips)
            if self._strips > KEPT_STRIPS:
                self._made.clear()
                self._strips = len(way.strips)
            self._made[start, end] = way
        return way

    def _make(self, start: int, end: int) -> Walk:
        strips = lay_out(
            start, end, self._grids, self._axes, self._counts, self._rows, self._sides,
            self._blocks,
        )  # fmt: skip
        there = strips[:, TARGET]
        if (there[1:] < there[:-1]).any():
            strips = strips[np.argsort(there, kind="stable")]
        return Walk(strips, self._steps, self._row_bytes, self._source, self._target)


def scatter(data: Any, addresses: I64, lengths: I64) -> None:
    """Write `data`, which is runs one after the other, to where they belong."""
    flat = np.frombuffer(data, dtype=np.uint8)
    begin = np.cumsum(lengths) - lengths
    # Copies, as what came over a wire may be read-only, for which nothing is compiled.
    copy_runs(begin + flat.ctypes.data, np.array(addresses), np.array(lengths))
