"""The inner loops of the data plane: copy runs, convert a walk, hash tiles. All compiled.

They work on bare addresses and run without the interpreter's lock; whoever calls has checked every
offset. What a *walk* is, `rows.py` says. Called with the types below and no others, so that
`warming.warm_up` has loaded all of them once it returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.raw import (
    PAIR_BYTES,
    as_float,
    compiled,
    copy,
    copy_fixed,
    inlined,
    load8,
    load32,
    nh,
    prefetch,
    store8,
    store32,
)
from transfer.rounding import (
    FLOAT32,
    SAME,
    encode,
    item_bytes,
    largest,
    narrow,
    pair,
    scale_up,
    settle,
    widen,
)
from transfer.walking import COUNT, FROM_SCALE, I64, PLANE, SOURCE, TARGET, TO_SCALE

U64 = NDArray[np.uint64]
Step = tuple[int, int, int, int]
Table = tuple[int, int, I64]
"""An array in memory: bytes of a region, bytes from layer to layer, addresses of the regions."""
Form = tuple[int, int, int, int, int, int, int, int]
"""How numbers are converted: the pairing, the kinds at source and target, head_dim, the rotary
numbers' first and end, the kind of the source's scales (or `UNSCALED`), whether the target is
scaled."""

Tiles = tuple[I64, Step, int, int, Table, int, Table, int, Form, U64, int, int, int, U64]
"""What `add_tiles` is told."""

UNSCALED = -1
AHEAD_BYTES = 2048
"""How far before a tile is hashed its memory is asked for."""

LINE_BYTES = 64
WORD_BYTES = 8

TOKEN_BITS = 32
"""Places of neighbouring heads are so many bits apart; below them is the token."""

TOKENS = (1 << TOKEN_BITS) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def scratch_bytes(items: int) -> int:
    """Room that `move` and `add_tiles` need where rows have `items` numbers."""
    return 12 * items + LINE_BYTES


@inlined
def _address(bases: Any, region_bytes: int, offset: int) -> int:
    """Where `offset` of an array lies."""
    if len(bases) == 1:
        return int(bases[0] + offset)
    region = offset // region_bytes
    return int(bases[region] + offset - region * region_bytes)


@inlined
def address_in(table: Table, offset: int, layer: int) -> int:
    """Where what lies at `offset` in layer 0 of a table lies in `layer`."""
    return _address(table[2], table[0], offset + layer * table[1])


@compiled
def copy_runs(sources: I64, targets: I64, lengths: I64) -> None:
    """Copy runs of `lengths` bytes between addresses."""
    for i in range(len(lengths)):
        copy(targets[i], sources[i], lengths[i])


@compiled
def _copy_rows(
    source: int, target: int, count: int, source_step: int, target_step: int, row_bytes: int
) -> None:
    """Copy `count` rows that lie `source_step` and `target_step` bytes apart."""
    if row_bytes == 64:
        for _ in range(count):
            copy_fixed(target, source, 64)
            source += source_step
            target += target_step
    elif row_bytes == 128:
        for _ in range(count):
            copy_fixed(target, source, 128)
            source += source_step
            target += target_step
    elif row_bytes == 256:
        for _ in range(count):
            copy_fixed(target, source, 256)
            source += source_step
            target += target_step
    elif row_bytes == 512:
        for _ in range(count):
            copy_fixed(target, source, 512)
            source += source_step
            target += target_step
    else:
        for _ in range(count):
            copy(target, source, row_bytes)
            source += source_step
            target += target_step


@compiled
def _pair_rows(source: int, target: int, items: int, form: Form) -> None:
    """Pair the rotary numbers of each head vector in a row anew; copy the others."""
    how, kind, _, dim, first, end, _, _ = form
    size = item_bytes(kind)
    for i in range(0, items * size, dim * size):
        if end - first != dim:
            copy(target + i, source + i, dim * size)
        pair(how, size, source + i + first * size, target + i + first * size, end - first)


@inlined
def _scale(table: Table, kind: int, offset: int, layer: int, room: int) -> Any:
    """A scale of the source, in float32."""
    widen(kind, address_in(table, offset, layer), room, 1)
    return as_float(load32(room, 0))


@compiled
def _floats(source: int, items: int, paired: bool, form: Form, scale: Any, scratch: int) -> int:
    """The address of a row's numbers as float32: the source's, or in `scratch` of 8 each."""
    kind, scale_kind = form[1], form[6]
    if paired:
        _pair_rows(source, scratch, items, form)
        source = scratch
    if kind == FLOAT32:
        return source
    wide = scratch + 4 * items
    widen(kind, source, wide, items)
    if scale_kind != UNSCALED:
        scale_up(wide, items, scale)
    return wide


@compiled
def _convert(
    source: int, target: int, items: int, paired: bool, form: Form, scale: Any, to_scale: Any,
    scratch: int,
) -> None:  # fmt: skip
    """Convert a row of `items` numbers, whole head vectors, with room for 8 bytes each."""
    kind, to_kind, scaled, to_scaled = form[1], form[2], form[6] != UNSCALED, form[7]
    if kind == to_kind and not scaled and not to_scaled:
        if paired:
            _pair_rows(source, target, items, form)
        else:
            copy(target, source, items * item_bytes(kind))
        return
    if to_kind == FLOAT32 and not scaled and not paired:
        widen(kind, source, target, items)
        return
    wide = _floats(source, items, paired, form, scale, scratch)
    if to_scaled:
        encode(to_kind, wide, target, items, to_scale)
    else:
        narrow(to_kind, wide, target, items)


@compiled
def move(
    strips: I64, steps: Step, row_bytes: tuple[int, int], first: int, last: int, source: Table,
    target: Table, source_scales: Table, scales: int, form: Form, scratch: int,
) -> None:  # fmt: skip
    """Carry out a walk for layers `first` to `last` (exclusive).

    A target without region bytes is written from its base on, without gaps, as the walk goes.
    `scales` is the address of the target's, as float32.
    """
    gapless = target[0] == 0
    step, to_step = steps[SOURCE], row_bytes[1] if gapless else steps[TARGET]
    how, kind, to_kind, scale_kind = form[0], form[1], form[2], form[6]
    plain = kind == to_kind and scale_kind == UNSCALED and not form[7]
    joined = step == row_bytes[0] and to_step == row_bytes[1]
    items = row_bytes[0] // item_bytes(kind)
    room = scratch + 8 * items
    scale, to_scale = np.float32(0), np.float32(0)
    at = target[2][0]
    for layer in range(first, last):
        for i in range(len(strips)):
            count = strips[i, COUNT]
            begin = address_in(source, strips[i, SOURCE], layer)
            if not gapless:
                at = address_in(target, strips[i, TARGET], layer)
            paired = how != SAME and strips[i, PLANE] == 0
            if plain and not paired and joined:
                copy(at, begin, count * row_bytes[0])
            elif plain and not paired:
                _copy_rows(begin, at, count, step, to_step, row_bytes[0])
            else:
                for c in range(count):
                    if scale_kind != UNSCALED:
                        offset = strips[i, FROM_SCALE] + c * steps[FROM_SCALE]
                        scale = _scale(source_scales, scale_kind, offset, layer, room)
                    if form[7]:
                        where = scales + strips[i, TO_SCALE] + c * steps[TO_SCALE]
                        to_scale = as_float(load32(where, 0))
                    _convert(
                        begin + c * step, at + c * to_step, items, paired, form, scale, to_scale,
                        scratch,
                    )  # fmt: skip
            if gapless:
                at += count * row_bytes[1]


@compiled
def find_scales(
    strips: I64, steps: Step, layer: int, source: Table, source_scales: Table, scales: int,
    form: Form, scratch: int,
) -> None:  # fmt: skip
    """Raise each of the target's scales to the largest magnitude of the walk's rows that share it.

    The rows are single head vectors, in the TARGET column as in `add_tiles`.
    """
    dim, scale_kind = form[3], form[6]
    room = scratch + 8 * dim
    scale = np.float32(0)
    for i in range(len(strips)):
        for c in range(strips[i, COUNT]):
            if scale_kind != UNSCALED:
                offset = strips[i, FROM_SCALE] + c * steps[FROM_SCALE]
                scale = _scale(source_scales, scale_kind, offset, layer, room)
            vector = address_in(source, strips[i, TARGET], layer) + c * steps[TARGET]
            most = largest(_floats(vector, dim, False, form, scale, scratch), dim)
            where = scales + strips[i, TO_SCALE] + c * steps[TO_SCALE]
            store32(where, 0, max(most, load32(where, 0)))


@compiled
def settle_scales(scales: int, count: int, kind: int, scale_kind: int, room: int) -> None:
    """Turn largest magnitudes into scales; see `rounding.settle`."""
    settle(scales, count, kind, scale_kind, room)


@inlined
def _mix(value: Any) -> Any:
    """Spread every bit over all others, one to one (the finaliser of SplitMix64)."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


@inlined
def _hash(address: int, size: int, keys: int, scratch: int) -> Any:
    """NH of a tile of `size` bytes, filled up with zeros, in halves; `scratch` has room for 16."""
    if size == 128:
        return nh(address, keys, 8)
    if size == 256:
        return nh(address, keys, 16)
    low, high = np.uint64(0), np.uint64(0)
    whole = size // PAIR_BYTES * PAIR_BYTES
    for at in range(0, whole, PAIR_BYTES):
        low, high = _sum(low, high, nh(address + at, keys + at, 1))
    if whole < size:
        for i in range(PAIR_BYTES):
            store8(scratch, i, load8(address, whole + i) if whole + i < size else np.uint8(0))
        low, high = _sum(low, high, nh(scratch, keys + whole, 1))
    return low, high


@inlined
def _sum(low: Any, high: Any, more: tuple[Any, Any]) -> tuple[Any, Any]:
    """Of numbers of 128 bits, in halves."""
    total = low + more[0]
    return total, high + more[1] + np.uint64(total < low)


@inlined
def _add_strip(
    tile: int, step: int, count: int, size: int, tags: tuple[Any, Any], key: int, scratch: int
) -> tuple[Any, Any]:
    """The sums over `count` tiles `step` bytes apart; `tags` stand for the places, in two parts."""
    x, y = np.uint64(0), np.uint64(0)
    tag = tags[0]
    for _ in range(count):
        for line in range(0, size, LINE_BYTES):
            prefetch(tile + AHEAD_BYTES + line)
        low, high = _hash(tile, size, key, scratch)
        low = _mix(low + tag)
        x += low
        y += _mix(high + low)
        tile += step
        tag += tags[1]
    return x, y


@compiled
def add_tiles(
    strips: I64, steps: Step, first: int, last: int, source: Table, layer_places: int,
    source_scales: Table, scales: int, form: Form, keys: U64, key: int, scratch: int, apart: int,
    sums: U64,
) -> None:  # fmt: skip
    """Add the hashes of all tiles of a walk to `sums`, for layers `first` to `last` (exclusive).

    The walk leads from places to memory: SOURCE is the place of a strip's first tile, TARGET its
    offset. `key` is the address of `keys`, the last of which is the seed. `sums` has a line for
    each `apart` tokens; the tokens of a strip all belong to the same.
    """
    how, kind, to_kind, dim, _, _, scale_kind, to_scaled = form
    plain = kind == to_kind and scale_kind == UNSCALED and not to_scaled
    seed = keys[-1]
    to_tile_bytes = dim * item_bytes(to_kind)
    step = steps[TARGET]
    converted = scratch + 8 * dim
    room = scratch + 12 * dim
    scale, to_scale = np.float32(0), np.float32(0)
    for layer in range(first, last):
        for i in range(len(strips)):
            tile = address_in(source, strips[i, TARGET], layer)
            count = strips[i, COUNT]
            place = strips[i, SOURCE] + layer * layer_places
            tags = np.uint64(place) * GOLDEN + seed, np.uint64(steps[SOURCE]) * GOLDEN
            paired = how != SAME and strips[i, PLANE] == 0
            line_of = (strips[i, SOURCE] & TOKENS) // apart
            x, y = sums[line_of, 0], sums[line_of, 1]
            if plain and not paired:
                # Told the size, the compiler leaves no loop within a tile.
                if to_tile_bytes == 128:
                    more = _add_strip(tile, step, count, 128, tags, key, room)
                elif to_tile_bytes == 256:
                    more = _add_strip(tile, step, count, 256, tags, key, room)
                else:
                    more = _add_strip(tile, step, count, to_tile_bytes, tags, key, room)
                sums[line_of, 0], sums[line_of, 1] = x + more[0], y + more[1]
                continue
            for c in range(count):
                if scale_kind != UNSCALED:
                    offset = strips[i, FROM_SCALE] + c * steps[FROM_SCALE]
                    scale = _scale(source_scales, scale_kind, offset, layer, room)
                if to_scaled:
                    where = scales + strips[i, TO_SCALE] + c * steps[TO_SCALE]
                    to_scale = as_float(load32(where, 0))
                _convert(
                    tile + c * step, converted, dim, paired, form, scale, to_scale, scratch
                )  # fmt: skip
                one = tags[0] + np.uint64(c) * tags[1], tags[1]
                more = _add_strip(converted, 0, 1, to_tile_bytes, one, key, room)
                x, y = x + more[0], y + more[1]
            sums[line_of, 0], sums[line_of, 1] = x, y
