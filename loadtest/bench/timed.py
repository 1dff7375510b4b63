"""Open-loop requests, each timed from its sending to its first token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from loadtest.bench.client import LoadFailed
from loadtest.bench.wire import DONE, TOKEN

END = b"\r\n0\r\n\r\n"
DRAIN_SECONDS = 10.0


class _Connection(asyncio.Protocol):
    """Streamed answers, one after another."""

    def __init__(self, free: list[_Connection], times: list[float]) -> None:
        self._free = free
        self._times = times
        self._data = b""
        self._sent = 0.0
        self._first = False
        self._transport: Any = None
        self.busy = False
        self.problem = ""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes) -> None:
        self.busy, self._first, self._data = True, False, b""
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._data += data
        if not self._first and TOKEN in self._data:
            self._first = True
            self._times.append(now - self._sent)
        if self._data.endswith(END):
            if DONE not in self._data or not self._first:
                self.problem = self._data[:400].decode(errors="replace")
            self.busy = False
            self._free.append(self)
        elif not self._first and b" 200 " not in self._data[:20]:
            self.problem = self._data[:400].decode(errors="replace")

    def connection_lost(self, exc: Exception | None) -> None:
        self.problem = self.problem or f"the server closed a connection: {exc!r}"

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class OpenLoop:
    """Sends requests to one server at a given rate, whether or not it keeps up."""

    def __init__(self, port: int) -> None:
        self.times: list[float] = []
        self._port = port
        self._free: list[_Connection] = []
        self._all: list[_Connection] = []

    async def run(self, requests: Sequence[bytes], per_second: float) -> None:
        """Send all of them, and wait for the answers.

        Raises:
            LoadFailed: an answer was not what was asked for.
            TimeoutError: answers did not end in time.
        """
        due = time.perf_counter()
        for request in requests:
            connection = self._free.pop() if self._free else await self._open()
            connection.send(request)
            due += 1 / per_second
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with asyncio.timeout(DRAIN_SECONDS):
            while any(one.busy and not one.problem for one in self._all):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        problem = next((one.problem for one in self._all if one.problem), "")
        if problem:
            raise LoadFailed(problem)

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(self._free, self.times), "127.0.0.1", self._port
        )
        self._all.append(connection)
        return connection

    def close(self) -> None:
        """Close all connections."""
        for connection in self._all:
            connection.connection_lost = lambda exc: None  # type: ignore[method-assign]
            connection.close()
