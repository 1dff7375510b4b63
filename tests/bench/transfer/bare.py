"""The physical limit of a socket here: nothing but `sendmsg` and `recvmsg_into`, and one byte back.

The runs are known to both ends beforehand and their views are made before the clock starts;
nothing is framed, checked or converted.
"""

from __future__ import annotations

import socket
import time
from itertools import pairwise

import numpy as np

from tests.bench.transfer.cases import Case, Runs, is_there
from tests.bench.transfer.memory import source_pool, target_pool

BUFFER_BYTES = 4 << 20
IOV_MAX = 1024
GROUP_BYTES = 128 << 10
"""What one `recvmsg` waits for, so that a buffer is copied out while it is in the cache."""

Group = list[memoryview]


class Receiver:
    """Takes the runs straight into the pool."""

    def __init__(self, case: Case) -> None:
        self._runs = case.runs()
        self._pool = target_pool(case, case.target)
        self._groups = _groups(self._pool.data, _cut(self._runs)[:, 1:])
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)

    async def offer(self) -> int:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        port: int = self._listener.getsockname()[1]
        return port

    async def meet(self, told: None) -> None:
        self._socket, _ = self._listener.accept()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def expect(self, count: int) -> None:
        """Nothing to prepare."""

    async def take(self, count: int) -> None:
        for _ in range(count):
            for group in self._groups:
                self._fill(group)
            self._socket.send(b"!")

    def _fill(self, group: Group) -> None:
        wanted = sum(map(len, group))
        got = self._socket.recvmsg_into(group, 0, socket.MSG_WAITALL)[0]
        while got < wanted:  # a signal, or the end
            rest = _after(group, got)
            more = self._socket.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0]
            if not more:
                raise ConnectionResetError("the sender is gone")
            got += more

    def arrived(self) -> bool:
        return is_there(self._pool, self._runs)


class Sender:
    """Sends the runs from the pool."""

    def __init__(self, case: Case) -> None:
        pool = source_pool(case, case.target)
        runs = case.runs()
        self._views = [pool.data[at : at + size] for at, _, size in runs.tolist()]
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    async def offer(self) -> None:
        """The receiver listens."""

    async def meet(self, told: int) -> None:
        self._socket.connect(("127.0.0.1", told))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def send(self, told: None, count: int) -> list[float]:
        return [self._once() for _ in range(count)]

    def _once(self) -> float:
        began = time.perf_counter()
        for first in range(0, len(self._views), IOV_MAX):
            rest = self._views[first : first + IOV_MAX]
            while rest:
                rest = _after(rest, self._socket.sendmsg(rest))
        if self._socket.recv(1) != b"!":
            raise ConnectionResetError("the receiver is gone")
        return time.perf_counter() - began


def _after(group: Group, count: int) -> Group:
    """What is left of `group` after its first `count` bytes."""
    for index, view in enumerate(group):
        if count < len(view):
            return [view[count:], *group[index + 1 :]]
        count -= len(view)
    return []


def _cut(runs: Runs) -> Runs:
    """Runs of at most `GROUP_BYTES`."""
    counts = -(-runs[:, 2] // GROUP_BYTES)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    before = (np.arange(counts.sum()) - first) * GROUP_BYTES
    cut = np.repeat(runs, counts, axis=0)
    cut[:, :2] += before[:, None]
    cut[:, 2] = np.minimum(cut[:, 2] - before, GROUP_BYTES)
    return cut


def _groups(pool: memoryview, runs: Runs) -> list[Group]:
    """Views of the runs, in groups of about `GROUP_BYTES`."""
    lengths = runs[:, 1]
    number = (np.cumsum(lengths) - lengths) // GROUP_BYTES
    borders = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(runs)]
    views = [pool[at : at + size] for at, size in runs.tolist()]
    return [views[first:last] for first, last in pairwise(borders)]
