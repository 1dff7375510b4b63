"""Have everything compiled, or loaded from disk, before a handoff has to wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

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
from transfer.raw import SOURCES, kept_in
from transfer.rounding import FLOAT16, FLOAT32, INT8, TO_HALF
from transfer.walking import I64, find_runs, lay_out

PATIENCE_SECONDS, LOOK_SECONDS = 60.0, 0.05

NOTHING: I64 = np.zeros(0, np.int64)


def warm_up() -> None:
    """Call every kernel once, with the types that it is called with. Takes seconds, once ever.

    Where several processes begin at the same time one compiles, and the others wait for that.
    """
    folder = kept_in(copy_runs)
    if folder is None or (done := folder / f"baton-{SOURCES[:16]}.done").exists():
        _call_all()
        return
    with _alone(folder / "baton.lock"):
        _call_all()
        for old in folder.glob("baton-*.done"):
            old.unlink(missing_ok=True)
        done.touch()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock, or go on without when whoever has it takes too long."""
    until = time.monotonic() + PATIENCE_SECONDS
    with path.open("w") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(LOOK_SECONDS)
            else:
                break
        yield


def _call_all() -> None:
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
