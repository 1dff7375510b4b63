"""Where the rows of a prefix lie, and how to walk from one pool's to another's.

A *row* is a run over a layout's innermost axes, contiguous on both sides; a *strip* is a few rows
whose distance is constant on either side; a *walk* is all strips of a slice, in the order of the
target. It is the same for every layer but for a constant, so it is made for layer 0 and kept.
Knows neither what the numbers mean nor where memory is: all offsets are bytes (or places, see
`digest.py`) in a flat, virtual array.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.kernels import (
    COUNT,
    FROM_SCALE,
    I64,
    PLANE,
    SOURCE,
    TARGET,
    TO_SCALE,
    copy_runs,
)
from transfer.layout import Axis, KVLayout, Order

MAX_POOL_BYTES = 1 << 62
"""Beyond this, places would not fit into 64 bits."""

STRIP_BYTES = 1 << 20
"""The most that one strip holds, unless a single row is more."""


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

    def at(self, tokens: I64) -> I64:
        """Where the first number of each of `tokens` lies, in layer 0, plane 0, head 0."""
        block, within = np.divmod(tokens, self.block_tokens)
        there: I64 = self.blocks[block] * self.step["block"] + within * self.step["token"]
        return there + self.origin

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
    numbers = np.asarray(blocks, dtype=np.int64)
    if len(blocks) < layout.blocks_for(tokens):
        raise ValueError(f"blocks: {len(blocks)} do not hold {tokens} tokens")
    if len(blocks) and not 0 <= numbers.min() <= numbers.max() < pool_blocks:
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

    `strips` has a line for each, whose columns `kernels.py` names, and `steps` says how far apart
    the rows of a strip are; `row_bytes` is a row's length, both at the source and at the target.
    """

    strips: I64
    steps: tuple[int, int, int, int]
    row_bytes: tuple[int, int]
    source: Side
    target: Side

    def rows(self) -> tuple[I64, I64]:
        """Where each single row begins, at the source and at the target."""
        count = self.strips[:, COUNT]
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        source, target = (
            np.repeat(self.strips[:, column], count) + within * self.steps[column]
            for column in (SOURCE, TARGET)
        )
        return source, target

    @property
    def target_runs(self) -> tuple[I64, I64]:
        """Offsets and lengths of the longest runs that the walk makes of the target."""
        if self.steps[TARGET] == self.row_bytes[TARGET]:
            target = self.strips[:, TARGET]
            lengths = self.strips[:, COUNT] * self.row_bytes[TARGET]
        else:
            _, target = self.rows()
            lengths = np.full(len(target), self.row_bytes[TARGET])
        first = self._first_of_run(target, lengths, np.zeros(len(target), np.bool_))
        return target[first], np.add.reduceat(lengths, first)

    @cached_property
    def runs(self) -> tuple[I64, I64, I64]:
        """Offsets at the source and at the target, and lengths, of what can be copied at once."""
        if self.steps[:2] == self.row_bytes:
            source, target = self.strips[:, SOURCE], self.strips[:, TARGET]
            lengths = self.strips[:, COUNT] * self.row_bytes[TARGET]
        else:
            source, target = self.rows()
            lengths = np.full(len(target), self.row_bytes[TARGET])
        jumps = np.zeros(len(source), np.bool_)
        jumps[1:] = source[1:] != source[:-1] + lengths[:-1]
        jumps[1:] |= source[1:] % self.source.region == 0
        first = self._first_of_run(target, lengths, jumps)
        return source[first], target[first], np.add.reduceat(lengths, first)

    def _first_of_run(self, target: I64, lengths: I64, jumps: NDArray[np.bool_]) -> I64:
        # The last block and, one round of blocks further, the first are no neighbours.
        after = target[1:]
        jumps[1:] |= (after != target[:-1] + lengths[:-1]) | (after % self.target.wrap == 0)
        jumps[1:] |= after % self.target.region == 0
        jumps[0] = True
        return np.flatnonzero(jumps)


class Kind(msgspec.Struct, frozen=True, eq=False):
    """What a walk goes over: how many planes and heads, in rows over which axes, of what length.

    `scales` are where the source's and the target's scales of each row lie, where it has some.
    """

    counts: Mapping[str, int]
    inner: tuple[Axis, ...]
    row_bytes: tuple[int, int]
    scales: tuple[Side | None, Side | None] = (None, None)


def walk(source: Side, target: Side, start: int, end: int, kind: Kind) -> Walk:
    """The walk over tokens `start` to `end`."""
    counts, row_bytes = kind.counts, kind.row_bytes
    order = [
        axis
        for axis in target.order.axes
        if axis != "layer" and axis not in kind.inner and counts.get(axis) != 1
    ]
    along: str = order[-1]  # along which strips lie, if rows are at constant distance there
    if along not in ("token", "head") or along in (*source.order.apart, *target.order.apart):
        along = "none"
    tokens, lengths = _pieces(source, target, start, end, along, max(row_bytes))
    there = target.at(tokens)
    if (there[1:] < there[:-1]).any():
        rank = np.argsort(there, kind="stable")
        tokens, there, lengths = tokens[rank], there[rank], lengths[rank]
    columns = {SOURCE: source, TARGET: target, FROM_SCALE: kind.scales[0], TO_SCALE: kind.scales[1]}
    known = {column: side for column, side in columns.items() if side is not None}
    axes = [axis for axis in order if axis not in ("token", along)]
    shape = [len(there) if it == "block" else counts[it] for it in axes]
    strips = np.zeros((*shape, len(columns) + 2), np.int64)
    strips[..., COUNT] = counts.get(along, 1)
    for place, axis in enumerate(axes):
        turned = [-1 if it == place else 1 for it in range(len(axes))]
        if axis == "block":
            for column, side in known.items():
                strips[..., column] += side.at(tokens).reshape(turned)
            strips[..., COUNT] *= lengths.reshape(turned)
            continue
        number = np.arange(counts[axis]).reshape(turned)
        for column, side in known.items():
            strips[..., column] += number * side.along(axis)
        if axis == "kv":
            strips[..., PLANE] = number
    strips = strips.reshape(-1, strips.shape[-1])
    if along != "token" and order.index("token") != order.index("block") + 1:
        strips = strips[np.argsort(strips[:, TARGET], kind="stable")]
    steps = [side.along(along) if side is not None else 0 for side in columns.values()]
    if along == "none":
        steps[:2] = row_bytes
    return Walk(strips, (steps[0], steps[1], steps[2], steps[3]), row_bytes, source, target)


class Walks:
    """The walks between two sides, each kept for the next layer, which usually asks the same."""

    def __init__(self, source: Side, target: Side, kind: Kind) -> None:
        """As `walk`, which makes them."""
        self._made: dict[tuple[int, int], Walk] = {}
        self._strips = 0
        self._make = partial(walk, source, target, kind=kind)

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


def _pieces(
    source: Side, target: Side, start: int, end: int, along: str, row_bytes: int
) -> tuple[I64, I64]:
    """Cut tokens into pieces: the first of each, and how many.

    Along tokens a piece lies within one block on either side; else it is a single token.
    """
    if along != "token":
        tokens = np.arange(start, end)
        return tokens, np.ones_like(tokens)
    grids = {source.block_tokens, target.block_tokens, max(1, STRIP_BYTES // row_bytes)}
    cuts = [np.arange(start // grid * grid + grid, end, grid) for grid in grids]
    first = np.unique(np.concatenate([[start], *cuts]))
    return first, np.diff(first, append=end)


def scatter(data: Any, addresses: I64, lengths: I64) -> None:
    """Write `data`, which is runs one after the other, to where they belong."""
    flat = np.frombuffer(data, dtype=np.uint8)
    begin = np.cumsum(lengths) - lengths
    # Copies, as what came over a wire may be read-only, for which nothing is compiled.
    copy_runs(begin + flat.ctypes.data, np.array(addresses), np.array(lengths))
