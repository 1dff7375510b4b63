"""Have everything compiled, or loaded from disk, before a handoff has to wait for it."""

from __future__ import annotations

import numpy as np

from transfer import sockets, taking
from transfer.kernels import (
    UNSCALED,
    Tiles,
    add_tiles,
    copy_runs,
    find_scales,
    move,
    settle_scales,
)
from transfer.rounding import FLOAT16, FLOAT32, INT8, TO_HALF
from transfer.walking import I64, find_runs, lay_out

NOTHING: I64 = np.zeros(0, np.int64)


def warm_up() -> None:
    """Call every kernel once, with the types that it is called with. Takes seconds, once ever."""
    memory = np.zeros(1024, np.uint8)
    at = memory.ctypes.data
    table = (1024, 0, np.array([at], np.int64))
    steps, form = (8, 8, 0, 0), (TO_HALF, FLOAT32, FLOAT16, 2, 0, 2, UNSCALED, 0)
    zero, sides = np.zeros(1, np.int64), np.ones((4, 6), np.int64)
    strips = lay_out(0, 1, (1, 1, 1), zero, zero, 1, sides, (zero, zero, zero, zero))
    find_runs(strips, (1, 1), (1, 1), (1, 1, 1), True)
    copy_runs(NOTHING, NOTHING, NOTHING)
    move(strips, steps, (8, 4), 0, 1, table, table, table, at, form, at + 512)
    find_scales(strips, steps, 0, table, table, at, form, at + 512)
    settle_scales(at, 1, INT8, FLOAT32, at + 512)
    keys, sums = np.zeros(3, np.uint64), np.zeros((1, 2), np.uint64)
    key, scratch = keys.ctypes.data, at + 512
    tiles: Tiles = strips, steps, 0, 1, table, 0, table, at, form, keys, key, scratch, 1, sums
    add_tiles(*tiles)
    places = sockets.Places(zero, zero)
    sockets.work_off(-1, 0, *places.table)
    told = (*places.table, taking.begin(0, 0), *tiles)
    taking.take(-1, *told)
