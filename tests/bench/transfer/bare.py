"""The physical limit of a socket here: nothing but `sendmsg` and `recvmsg_into`, and one byte back.

The runs are known to both ends beforehand and their views are made before the clock starts;
nothing is framed, checked or converted. `polled`: both ends ask again at once instead of sleeping,
as NIXL does, which is faster and costs both cores.
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
SENT_BYTES = 512 << 10
"""About how much one `sendmsg` gets: what lies in the socket's buffer shall stay in the cache."""

TAKEN_BYTES = 128 << 10
"""About how much one `recvmsg` waits for, for the same reason."""

Group = list[memoryview]


class Receiver:
    """Takes the runs straight into the pool."""

    def __init__(self, case: Case, *, polled: bool = False) -> None:
        self._polled = polled
        self._runs = case.runs()
        self._pool = target_pool(case, case.target)
        self._groups = _groups(self._pool.data, self._runs[:, 1:], TAKEN_BYTES)
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
        flags = socket.MSG_DONTWAIT if self._polled else socket.MSG_WAITALL
        for _ in range(count):
            for group in self._groups:
                self._fill(group, flags)
            self._socket.send(b"!")

    def _fill(self, group: Group, flags: int) -> None:
        while group:
            try:
                count = self._socket.recvmsg_into(group, 0, flags)[0]
            except BlockingIOError:
                continue
            if not count:
                raise ConnectionResetError("the sender is gone")
            group = _after(group, count)

    def arrived(self) -> bool:
        return is_there(self._pool, self._runs)


class Sender:
    """Sends the runs from the pool."""

    def __init__(self, case: Case, *, polled: bool = False) -> None:
        self._flags = socket.MSG_DONTWAIT if polled else 0
        pool = source_pool(case, case.target)
        self._groups = _groups(pool.data, case.runs()[:, [0, 2]], SENT_BYTES)
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
        for group in self._groups:
            self._empty(group)
        while (said := self._hear()) is None:
            pass
        if said != b"!":
            raise ConnectionResetError("the receiver is gone")
        return time.perf_counter() - began

    def _empty(self, group: Group) -> None:
        while group:
            try:
                group = _after(group, self._socket.sendmsg(group, [], self._flags))
            except BlockingIOError:
                continue

    def _hear(self) -> bytes | None:
        try:
            return self._socket.recv(1, self._flags)
        except BlockingIOError:
            return None


def _after(group: Group, count: int) -> Group:
    """What is left of `group` after its first `count` bytes."""
    for index, view in enumerate(group):
        if count < len(view):
            return [view[count:], *group[index + 1 :]]
        count -= len(view)
    return []


def _groups(pool: memoryview, runs: Runs, at_once: int) -> list[Group]:
    """Views of runs `(offset, length)`, in groups of about `at_once` bytes and at most `IOV_MAX`.

    A run that is longer is cut.
    """
    counts = -(-runs[:, 1] // at_once)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    before = (np.arange(counts.sum()) - first) * at_once
    offsets = np.repeat(runs[:, 0], counts) + before
    lengths = np.minimum(np.repeat(runs[:, 1], counts) - before, at_once)
    number = (np.cumsum(lengths) - lengths) // at_once
    borders = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
    views = [
        pool[at : at + size] for at, size in zip(offsets.tolist(), lengths.tolist(), strict=True)
    ]
    return [
        views[start:end]
        for group, after in pairwise(borders)
        for start, end in pairwise([*range(group, after, IOV_MAX), after])
    ]
