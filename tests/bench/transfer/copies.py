"""The physical limit of this machine's memory: `memcpy` of the same runs, and reading them."""

from __future__ import annotations

import ctypes
import time

import numba
import numpy as np

from tests.bench.transfer.cases import Case, is_there
from tests.bench.transfer.idle import Idle
from tests.bench.transfer.memory import source_pool, target_pool

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
_memcpy.restype = ctypes.c_size_t

Receiver = Idle


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _copy(source, target, runs):  # type: ignore[no-untyped-def]
    for i in range(len(runs)):
        _memcpy(target + runs[i, 1], source + runs[i, 0], runs[i, 2])


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _sum(words, runs):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(len(runs)):
        first = runs[i, 0] // 8
        for word in words[first : first + runs[i, 2] // 8]:
            total += word
    return total


class Sender:
    """Copies from one pool to another in this process, or only reads; the other one idles."""

    def __init__(self, case: Case, *, read: bool = False) -> None:
        self._read = read
        self._runs = case.runs()
        self._pool = source_pool(case, case.target)
        self._target = target_pool(case, case.target)
        self._words = self._pool[: len(self._pool) // 8 * 8].view(np.uint64)
        self._once()  # compiles

    async def offer(self) -> None:
        if not self._read and not is_there(self._target, self._runs):
            raise AssertionError("the copy is not what was copied")

    async def meet(self, told: None) -> None:
        """Nobody to meet."""

    async def send(self, told: None, count: int) -> list[float]:
        return [self._once() for _ in range(count)]

    def _once(self) -> float:
        began = time.perf_counter()
        if self._read:
            _sum(self._words, self._runs)
        else:
            _copy(self._pool.ctypes.data, self._target.ctypes.data, self._runs)
        return time.perf_counter() - began
