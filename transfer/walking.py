"""Lay out the strips of a walk and find the runs in it (see `rows.py`). All compiled.

Each handoff needs walks of its own, as its blocks are its own; a small one has no time for more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transfer.raw import compiled, inlined

I64 = NDArray[np.int64]

SOURCE, TARGET, FROM_SCALE, TO_SCALE, COUNT, PLANE = range(6)
"""Columns of a walk's strips; the first four have a step each."""

BLOCK_TOKENS, BLOCK, TOKEN, KV, HEAD, ORIGIN = range(6)
"""Columns of a table of sides: how a side's blocks are cut, its steps, and where it begins."""

Blocks = tuple[I64, I64, I64, I64]
Grids = tuple[int, int, int]
Bounds = tuple[int, int, int]
"""At every multiple of these a run ends: regions at the source and at the target, its rounds."""


@inlined
def _next_cut(token: int, end: int, grids: Grids) -> int:
    for grid in grids:
        end = min(end, (token // grid + 1) * grid)
    return end


@compiled
def lay_out(
    start: int, end: int, grids: Grids, axes: I64, counts: I64, rows: int, sides: I64,
    blocks: Blocks,
) -> I64:  # fmt: skip
    """The strips over tokens `start` to `end`, which are cut at every multiple of `grids`.

    They are nested as `axes` say (`BLOCK` for the pieces between cuts, `KV`, `HEAD`), so many along
    each as `counts` say; `rows` is how many rows each token of a piece gives a strip. A side
    without blocks is not there.
    """
    pieces = 0
    token = start
    while token < end:
        token = _next_cut(token, end, grids)
        pieces += 1
    first, length = np.empty(pieces, np.int64), np.empty(pieces, np.int64)
    token = start
    for piece in range(pieces):
        first[piece] = token
        token = _next_cut(token, end, grids)
        length[piece] = token - first[piece]
    total = 1
    for k in range(len(axes)):
        total *= pieces if axes[k] == BLOCK else counts[k]
    strips = np.zeros((total, 6), np.int64)
    for number in range(total):
        piece, plane, head, rest = 0, 0, 0, number
        for k in range(len(axes) - 1, -1, -1):
            count = pieces if axes[k] == BLOCK else counts[k]
            index, rest = rest % count, rest // count
            if axes[k] == BLOCK:
                piece = index
            elif axes[k] == KV:
                plane = index
            else:
                head = index
        for column in range(4):
            if len(blocks[column]):
                side = sides[column]
                block, within = divmod(first[piece], side[BLOCK_TOKENS])
                at = blocks[column][block] * side[BLOCK] + within * side[TOKEN] + side[ORIGIN]
                strips[number, column] = at + plane * side[KV] + head * side[HEAD]
        strips[number, COUNT] = rows * length[piece]
        strips[number, PLANE] = plane
    return strips


@compiled
def find_runs(
    strips: I64, steps: tuple[int, int], row_bytes: tuple[int, int], bounds: Bounds, both: bool
) -> tuple[I64, I64, I64]:
    """Offsets at source and target, and lengths, of what lies in one piece at the target.

    With `both`, also at the source, whose rows are as long then. The last block and, one round of
    blocks further, the first are no neighbours.
    """
    whole = steps[TARGET] == row_bytes[TARGET] and (not both or steps[SOURCE] == row_bytes[SOURCE])
    most = 0
    for i in range(len(strips)):
        most += 1 if whole else strips[i, COUNT]
    here, there = np.empty(most, np.int64), np.empty(most, np.int64)
    lengths = np.empty(most, np.int64)
    found = 0
    for i in range(len(strips)):
        size = row_bytes[TARGET] * (strips[i, COUNT] if whole else 1)
        for c in range(1 if whole else strips[i, COUNT]):
            source = strips[i, SOURCE] + c * steps[SOURCE]
            target = strips[i, TARGET] + c * steps[TARGET]
            last = found - 1
            joined = found > 0 and target == there[last] + lengths[last]
            joined = joined and target % bounds[1] != 0 and target % bounds[2] != 0
            if joined and both:
                joined = source == here[last] + lengths[last] and source % bounds[0] != 0
            if joined:
                lengths[last] += size
                continue
            here[found], there[found], lengths[found] = source, target, size
            found += 1
    return here[:found], there[:found], lengths[:found]
