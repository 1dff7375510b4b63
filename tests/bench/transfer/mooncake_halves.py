"""Mooncake's transfer engine over TCP, its two ends knowing each other without a server."""

from __future__ import annotations

import time

from mooncake.engine import TransferEngine

from tests.bench.transfer.cases import Case, is_there
from tests.bench.transfer.memory import source_pool, target_pool

BATCH = 512
"""Runs per call: of a few thousand at once it refuses some."""


def _engine() -> TransferEngine:
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("the engine did not initialise")
    return engine


class Receiver:
    """The pool that is written to; the engine's threads do the rest."""

    def __init__(self, case: Case) -> None:
        self._runs = case.runs()
        self._pool = target_pool(case, case.target)
        self._engine = _engine()
        if self._engine.register_memory(self._pool.ctypes.data, self._pool.nbytes) != 0:
            raise RuntimeError("the pool was not registered")

    async def offer(self) -> list[int]:
        return [self._engine.get_rpc_port(), self._pool.ctypes.data]

    async def meet(self, told: None) -> None:
        """The sender comes to us."""

    async def expect(self, count: int) -> None:
        """Nothing to prepare."""

    async def take(self, count: int) -> None:
        """Nobody tells this end: what its threads do is in the sender's time."""

    def arrived(self) -> bool:
        return is_there(self._pool, self._runs)


class Sender:
    """Writes the runs, one request each."""

    def __init__(self, case: Case) -> None:
        self._runs = case.runs()
        self._pool = source_pool(case, case.target)
        self._engine = _engine()
        if self._engine.register_memory(self._pool.ctypes.data, self._pool.nbytes) != 0:
            raise RuntimeError("the pool was not registered")

    async def offer(self) -> None:
        """The receiver is reached."""

    async def meet(self, told: list[int]) -> None:
        port, there = told
        self._peer = f"127.0.0.1:{port}"
        self._from = (self._pool.ctypes.data + self._runs[:, 0]).tolist()
        self._to = (there + self._runs[:, 1]).tolist()
        self._sizes = self._runs[:, 2].tolist()

    async def send(self, told: None, count: int) -> list[float]:
        return [self._once() for _ in range(count)]

    def _once(self) -> float:
        began = time.perf_counter()
        for first in range(0, len(self._sizes), BATCH):
            some = slice(first, first + BATCH)
            failed = self._engine.batch_transfer_sync_write(
                self._peer, self._from[some], self._to[some], self._sizes[some]
            )
            if failed:
                raise ConnectionError(f"the transfer ended with {failed}")
        return time.perf_counter() - began
