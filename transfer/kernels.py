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
    compiled,
    copy,
    copy_fixed,
    inlined,
    load8,
    load64,
    prefetch,
)
from transfer.rounding import FLOAT16, FLOAT32, SAME, TO_HALF, narrow, pair, widen

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

SOURCE, TARGET, COUNT, PLANE = range(4)
"""Columns of a walk's strips."""

AHEAD_BYTES = 2048
"""How far before a tile is hashed its memory is asked for."""

LINE_BYTES = 64
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


@inlined
def _address(bases: Any, region_bytes: int, offset: int) -> int:
    """Where `offset` of a pool's virtual array lies."""
    if len(bases) == 1:
        return int(bases[0] + offset)
    region = offset // region_bytes
    return int(bases[region] + offset - region * region_bytes)


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
def _convert(
    source: int, target: int, items: int, how: int, kinds: tuple[int, int], sizes: tuple[int, int],
    dim: int, scratch: int,
) -> None:  # fmt: skip
    """Convert `items` numbers that lie together, whole head vectors of `dim` numbers.

    `scratch` is the address of room for two times `items` numbers of four bytes.
    """
    at = source
    if how != SAME:
        at = target if kinds[0] == kinds[1] else scratch
        step = dim * sizes[0]
        for i in range(items // dim):
            pair(how, sizes[0], source + i * step, at + i * step, dim)
    if kinds[0] == kinds[1]:
        if how == SAME:
            copy(target, source, items * sizes[0])
    elif kinds[0] == FLOAT32:
        narrow(kinds[1], at, target, items)
    elif kinds[1] == FLOAT32:
        widen(kinds[0], at, target, items)
    else:
        wide = scratch + items * 4
        widen(kinds[0], at, wide, items)
        narrow(kinds[1], wide, target, items)


@compiled
def move(
    strips: I64, steps: tuple[int, int], row_bytes: tuple[int, int], first: int, last: int,
    source: tuple[int, int], target: tuple[int, int], bases: I64, to_bases: I64,
    form: tuple[int, int, int, int, int, int], scratch: int,
) -> None:  # fmt: skip
    """Carry out a walk for each layer from `first` to `last` (exclusive).

    `source` and `target` are (bytes of a region, bytes from layer to layer). A target without
    region bytes is written from its base on, without gaps, as the walk goes. `form` is (how to
    pair, kind and size at the source, kind and size at the target, head_dim).
    """
    how, kind, size, to_kind, to_size, dim = form
    step, to_step = steps
    gapless = target[0] == 0
    if gapless:
        to_step = row_bytes[1]
    verbatim = how == SAME and kind == to_kind
    joined = verbatim and step == row_bytes[0] and to_step == row_bytes[1]
    items = row_bytes[0] // size
    at = to_bases[0]
    for layer in range(first, last):
        for i in range(len(strips)):
            count = strips[i, COUNT]
            begin = _address(bases, source[0], strips[i, SOURCE] + layer * source[1])
            if not gapless:
                at = _address(to_bases, target[0], strips[i, TARGET] + layer * target[1])
            if joined:
                copy(at, begin, count * row_bytes[0])
            elif verbatim:
                _copy_rows(begin, at, count, step, to_step, row_bytes[0])
            else:
                paired = how if strips[i, PLANE] == 0 else SAME
                for c in range(count):
                    _convert(
                        begin + c * step, at + c * to_step, items, paired,
                        (kind, to_kind), (size, to_size), dim, scratch,
                    )  # fmt: skip
            if gapless:
                at += count * row_bytes[1]


@inlined
def _mix(value: Any) -> Any:
    """Spread every bit over all others, one to one (the finaliser of SplitMix64)."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


@compiled
def _hash(address: int, size: int, keys: U64) -> tuple[Any, Any]:
    """NH twice, each with keys of its own, over a tile of `size` bytes; see `digest.py`."""
    words = (size + 7) // 8
    first = np.uint64(0)
    second = np.uint64(0)
    for i in range(size // 8):
        word = load64(address, i)
        upper = word >> HALF
        first += ((word + keys[i]) & LOW) * ((upper + keys[words + i]) & LOW)
        second += ((word + keys[2 * words + i]) & LOW) * ((upper + keys[3 * words + i]) & LOW)
    if size % 8:
        word = np.uint64(0)
        for i in range(size // 8 * 8, size):
            word |= np.uint64(load8(address, i)) << np.uint64(8 * (i % 8))
        upper = word >> HALF
        i = words - 1
        first += ((word + keys[i]) & LOW) * ((upper + keys[words + i]) & LOW)
        second += ((word + keys[2 * words + i]) & LOW) * ((upper + keys[3 * words + i]) & LOW)
    return first, second


@compiled
def add_tiles(
    strips: I64, step: int, place_step: int, first: int, last: int, source: tuple[int, int],
    layer_places: int, bases: I64, form: tuple[int, int, int, int, int, int], keys: U64,
    scratch: int, sums: U64,
) -> None:  # fmt: skip
    """Add the hashes of all tiles of a walk to `sums`, in two lanes.

    The walk leads from places to memory: SOURCE is the place of a strip's first tile, TARGET its
    offset. `form` is as in `move`; the last of `keys` is the seed.
    """
    how, kind, size, to_kind, to_size, dim = form
    verbatim = how == SAME and kind == to_kind
    seed = keys[-1]
    tile_bytes = dim * size
    ahead = max(step, AHEAD_BYTES // step * step)
    x, y = sums[0], sums[1]
    for layer in range(first, last):
        for i in range(len(strips)):
            tile = _address(bases, source[0], strips[i, TARGET] + layer * source[1])
            place = strips[i, SOURCE] + layer * layer_places
            paired = how if strips[i, PLANE] == 0 else SAME
            for _ in range(strips[i, COUNT]):
                if verbatim:
                    for line in range(0, tile_bytes, LINE_BYTES):
                        prefetch(tile + ahead + line)
                    one, other = _hash(tile, tile_bytes, keys)
                else:
                    _convert(
                        tile, scratch, dim, paired, (kind, to_kind), (size, to_size), dim,
                        scratch + 4 * dim,
                    )  # fmt: skip
                    one, other = _hash(scratch, dim * to_size, keys)
                one = _mix(one + np.uint64(place) * GOLDEN + seed)
                x += one
                y += _mix(other + one)
                tile += step
                place += place_step
    sums[0], sums[1] = x, y


def warm_up() -> None:
    """Compile every kernel or load it from disk, so that no handoff has to wait for that."""
    memory = np.zeros(256, np.uint8)
    at = memory.ctypes.data
    copy_runs(*(np.zeros(0, np.int64) for _ in range(3)))
    bases = np.array([at], np.int64)
    strips = np.array([[0, 128, 1, 0]], np.int64)
    for form in ((SAME, FLOAT32, 4, FLOAT32, 4, 2), (TO_HALF, FLOAT32, 4, FLOAT16, 2, 2)):
        move(strips, (8, 8), (8, 8), 0, 1, (256, 0), (256, 0), bases, bases, form, at + 64)
        sums = np.zeros(2, np.uint64)
        add_tiles(strips, 8, 1, 0, 1, (256, 0), 0, bases, form, np.zeros(9, np.uint64), at, sums)
