"""The inner loops of the data plane: copy runs, convert a walk, hash tiles. All compiled.

They work on bare addresses and run without the interpreter's lock; whoever calls has checked every
offset. What a *walk* is, `rows.py` says. Called with the types below and no others, so that
`warm_up` has loaded all of them once it returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.raw import (
    CHUNK_BYTES,
    as_float,
    compiled,
    copy,
    copy_fixed,
    inlined,
    load8,
    load32,
    load64,
    nh,
    prefetch,
    store8,
    store32,
)
from transfer.rounding import (
    FLOAT16,
    FLOAT32,
    INT8,
    SAME,
    TO_HALF,
    encode,
    item_bytes,
    largest,
    narrow,
    pair,
    scale_up,
    settle,
    widen,
)

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Step = tuple[int, int, int, int]
Table = tuple[int, int, I64]
"""An array in memory: bytes of a region, bytes from layer to layer, addresses of the regions."""
Form = tuple[int, int, int, int, int, int, int, int]
"""How numbers are converted: the pairing, the kinds at source and target, head_dim, the rotary
numbers' first and end, the kind of the source's scales (or `UNSCALED`), whether the target is
scaled."""

SOURCE, TARGET, FROM_SCALE, TO_SCALE, COUNT, PLANE = range(6)
"""Columns of a walk's strips; the first four have a step each."""

UNSCALED = -1
AHEAD_BYTES = 2048
"""How far before a tile is hashed its memory is asked for."""

WORD_BYTES = 8
CHUNK_KEYS = 32
"""Words of the key for each chunk of a tile."""

TOKEN_BITS = 32
"""Places of neighbouring heads are so many bits apart; below them is the token."""

TOKENS = (1 << TOKEN_BITS) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def scratch_bytes(items: int) -> int:
    """Room that `move` and `add_tiles` need where rows have `items` numbers."""
    return 12 * items + 2 * CHUNK_BYTES


@inlined
def _address(bases: Any, region_bytes: int, offset: int) -> int:
    """Where `offset` of an array lies."""
    if len(bases) == 1:
        return int(bases[0] + offset)
    region = offset // region_bytes
    return int(bases[region] + offset - region * region_bytes)


@inlined
def _at(table: Table, offset: int, layer: int) -> int:
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
    widen(kind, _at(table, offset, layer), room, 1)
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
    strips: I64, steps: Step, row_bytes: tuple[int, int], layer: int, source: Table,
    target: Table, source_scales: Table, scales: int, form: Form, scratch: int,
) -> None:  # fmt: skip
    """Carry out a walk for one layer.

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
    for i in range(len(strips)):
        count = strips[i, COUNT]
        begin = _at(source, strips[i, SOURCE], layer)
        if not gapless:
            at = _at(target, strips[i, TARGET], layer)
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
            vector = _at(source, strips[i, TARGET], layer) + c * steps[TARGET]
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
def _hash(address: int, size: int, keys: int, scratch: int) -> tuple[Any, Any]:
    """Both NH sums over a tile of `size` bytes; `scratch` has room for one chunk."""
    if size <= WORD_BYTES:
        word = np.uint64(0)
        for i in range(size):
            word |= np.uint64(load8(address, i)) << np.uint64(8 * i)
        upper = word >> HALF
        first = ((word + load64(keys, 0)) & LOW) * ((upper + load64(keys, 1)) & LOW)
        second = ((word + load64(keys, 2)) & LOW) * ((upper + load64(keys, 3)) & LOW)
        return first, second
    chunks = size // CHUNK_BYTES
    left = size - chunks * CHUNK_BYTES
    first, second = np.uint64(0), np.uint64(0)
    if chunks:
        first, second = nh(address, chunks, keys)
    if left:
        copy(scratch, address + chunks * CHUNK_BYTES, left)
        for i in range(left, CHUNK_BYTES):
            store8(scratch, i, np.uint8(0))
        one, other = nh(scratch, 1, keys + chunks * CHUNK_KEYS * WORD_BYTES)
        first, second = first + one, second + other
    return first, second


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
    tile_bytes, to_tile_bytes = dim * item_bytes(kind), dim * item_bytes(to_kind)
    step = steps[TARGET]
    ahead = max(step, AHEAD_BYTES // step * step)
    converted = scratch + 8 * dim
    room = scratch + 12 * dim
    scale, to_scale = np.float32(0), np.float32(0)
    for layer in range(first, last):
        for i in range(len(strips)):
            begin = _at(source, strips[i, TARGET], layer)
            place = strips[i, SOURCE] + layer * layer_places
            paired = how != SAME and strips[i, PLANE] == 0
            line_of = (strips[i, SOURCE] & TOKENS) // apart
            x, y = sums[line_of, 0], sums[line_of, 1]
            for c in range(strips[i, COUNT]):
                tile = begin + c * step
                for line in range(0, tile_bytes, CHUNK_BYTES):
                    prefetch(tile + ahead + line)
                if not plain or paired:
                    if scale_kind != UNSCALED:
                        offset = strips[i, FROM_SCALE] + c * steps[FROM_SCALE]
                        scale = _scale(source_scales, scale_kind, offset, layer, room)
                    if to_scaled:
                        where = scales + strips[i, TO_SCALE] + c * steps[TO_SCALE]
                        to_scale = as_float(load32(where, 0))
                    _convert(tile, converted, dim, paired, form, scale, to_scale, scratch)
                    tile = converted
                one, other = _hash(tile, to_tile_bytes, key, room)
                one = _mix(one + np.uint64(place + c * steps[SOURCE]) * GOLDEN + seed)
                x += one
                y += _mix(other + one)
            sums[line_of, 0], sums[line_of, 1] = x, y


def warm_up() -> None:
    """Compile every kernel or load it from disk, so that no handoff has to wait for that."""
    memory = np.zeros(1024, np.uint8)
    at = memory.ctypes.data
    copy_runs(*(np.zeros(0, np.int64) for _ in range(3)))
    table = (1024, 0, np.array([at], np.int64))
    strips = np.array([[0, 128, 0, 0, 1, 0]], np.int64)
    keys, sums = np.zeros(CHUNK_KEYS + 1, np.uint64), np.zeros((1, 2), np.uint64)
    form = (TO_HALF, FLOAT32, FLOAT16, 2, 0, 2, UNSCALED, 0)
    steps = (8, 8, 0, 0)
    move(strips, steps, (8, 4), 0, table, table, table, at, form, at + 512)
    find_scales(strips, steps, 0, table, table, at, form, at + 512)
    settle_scales(at, 1, INT8, FLOAT32, at + 512)
    add_tiles(
        strips, steps, 0, 1, table, 0, table, at, form, keys, keys.ctypes.data, at + 512, 1, sums
    )  # fmt: skip
