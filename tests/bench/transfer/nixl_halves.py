"""NIXL over UCX, as its documentation would have it: registered once, descriptors prepared once.

The transport is chosen by `UCX_TLS` in the process's environment. `progress`: with the thread
that NIXL starts unless told otherwise; without it, both ends poll.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from nixl_cu12 import nixl_agent, nixl_agent_config
from numpy.typing import NDArray

from tests.bench.transfer.cases import Case, Runs, is_there
from tests.bench.transfer.memory import source_pool, target_pool

DONE = b"done"


class _Half:
    def __init__(self, name: str, pool: NDArray[np.uint8], progress: bool, errors: str) -> None:
        self._pool = pool
        self._agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=progress, backends=[]))
        self._agent.create_backend("UCX", {"ucx_error_handling_mode": errors})
        self._agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")

    async def offer(self) -> dict[str, Any]:
        return {
            "metadata": self._agent.get_agent_metadata().hex(),
            "address": self._pool.ctypes.data,
        }

    async def meet(self, told: dict[str, Any]) -> None:
        self._peer = self._agent.add_remote_agent(bytes.fromhex(told["metadata"]))
        self._there = told["address"]

    def _heard(self) -> int:
        """Wait for what the other half has to say; how many times it did."""
        while not (heard := self._agent.get_new_notifs()):
            pass
        return sum(map(len, heard.values()))


class Receiver(_Half):
    """The pool that is written to. Polls, as UCX over TCP moves nothing otherwise."""

    def __init__(self, case: Case, *, progress: bool, errors: str = "peer") -> None:
        self._runs = case.runs()
        super().__init__("receiver", target_pool(case, case.target), progress, errors)

    async def expect(self, count: int) -> None:
        """Nothing to prepare."""

    async def take(self, count: int) -> None:
        while count:
            count -= self._heard()

    def arrived(self) -> bool:
        return is_there(self._pool, self._runs)


class Sender(_Half):
    """Writes the runs, one descriptor each."""

    def __init__(self, case: Case, *, progress: bool, errors: str = "peer") -> None:
        self._runs = case.runs()
        super().__init__("sender", source_pool(case, case.target), progress, errors)

    async def meet(self, told: dict[str, Any]) -> None:
        await super().meet(told)
        self._agent.make_connection(self._peer)
        here = _descriptors(self._pool.ctypes.data + self._runs[:, 0], self._runs[:, 2])
        there = _descriptors(self._there + self._runs[:, 1], self._runs[:, 2])
        self._local = self._agent.prep_xfer_dlist("", here, "DRAM")
        self._remote = self._agent.prep_xfer_dlist(self._peer, there, "DRAM")
        self._every = np.arange(len(self._runs), dtype=np.int32)

    async def send(self, told: None, count: int) -> list[float]:
        return [self._once() for _ in range(count)]

    def _once(self) -> float:
        began = time.perf_counter()
        handle = self._agent.make_prepped_xfer(
            "WRITE", self._local, self._every, self._remote, self._every, DONE
        )
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        took = time.perf_counter() - began
        if state != "DONE":
            raise ConnectionError(f"the transfer ended with {state}")
        handle.release()
        return took


def _descriptors(addresses: Runs, lengths: Runs) -> NDArray[np.uint64]:
    """Rows of (address, length, device)."""
    devices = np.zeros_like(lengths)
    return np.stack([addresses, lengths, devices], axis=1).astype(np.uint64)
