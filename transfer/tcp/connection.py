"""The sender's end of one connection: a thread that sends, and callbacks that hear answers.

Knows frames and tickets, not layouts. The thread works jobs off in their order, so whatever is
submitted later is sent later; the event loop is never kept from its other work by a send.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from transfer.errors import PeerLost, PeerMisbehaved
from transfer.layout import Endpoint
from transfer.tcp import wire


class Listener(Protocol):
    """Hears what becomes of one ticket."""

    def answered(self, answer: wire.Answer) -> None:
        """The receiver said how the handoff ended."""

    def lost(self, reason: PeerLost) -> None:
        """The connection broke."""


class Connection(asyncio.Protocol):
    """One connection, from the handshake on, until it is lost; then it stays lost."""

    def __init__(
        self,
        endpoint: Endpoint,
        backlog_bytes: int,
        stall_seconds: float,
        mourn: Callable[[Endpoint, PeerLost], None],
    ) -> None:
        """Prepare; asyncio connects it. `mourn` is told when it ends after it was welcomed."""
        self._loop = asyncio.get_running_loop()
        self._endpoint = endpoint
        self._mourn = mourn
        self._stall_seconds = stall_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"tcp-send-{endpoint.address}")
        self._tickets = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._received = bytearray()
        self._transport: asyncio.BaseTransport | None = None
        self._broken = False
        self.backlog = Backlog(backlog_bytes)
        self.lost: PeerLost | None = None
        self.welcomed: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    # ---- what asyncio calls -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A second object for the same socket: the thread waits on it, with a time limit, while
        # the event loop reads from the first.
        try:
            self._socket = wire.twin(transport)
            self._socket.settimeout(self._stall_seconds)
            wire.notice_death(self._socket, self._stall_seconds)
        except OSError as error:
            transport.close()
            self.lose(PeerLost(f"no socket for {self._endpoint.address}: {error}"))
        else:
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while (message := self._take_message()) is not None:
                self._hear(message)
        except PeerMisbehaved as error:
            self.lose(PeerLost(f"{self._endpoint.address} misbehaved: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(PeerLost(f"{self._endpoint.address} closed the connection ({exc or 'end'})"))

    # ---- what writers call ------------------------------------------------------------------

    def enter(self, listener: Listener) -> int:
        """Give out a ticket."""
        ticket = next(self._tickets)
        self._listeners[ticket] = listener
        return ticket

    def leave(self, ticket: int) -> None:
        """Hear no more of a ticket."""
        self._listeners.pop(ticket, None)

    async def round_trip(self, seconds: float) -> float:
        """Seconds until a message is answered, at most `seconds`.

        Raises:
            PeerLost: the connection is lost, or nothing was answered in time.
        """
        echo = _Echo(self._loop.create_future())
        ticket = self.enter(echo)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                # An abort of what was never opened is answered, and changes nothing.
                await self.submit(self.send, wire.Abort(ticket))
                await echo.heard
        except (OSError, TimeoutError) as error:
            raise PeerLost(f"{self._endpoint.address} did not answer: {error!r}") from error
        finally:
            self.leave(ticket)
        return time.monotonic() - begun

    def submit(self, job: Callable[..., None], *arguments: Any) -> asyncio.Future[None]:
        """Have the thread do `job`, after all earlier ones.

        Raises:
            PeerLost: the connection is lost.
        """
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        return self._loop.run_in_executor(self._thread, self._do, job, *arguments)

    def _do(self, job: Callable[..., None], *arguments: Any) -> None:
        """In the thread: after a write that failed half-way there must not be another."""
        if self._broken:
            raise ConnectionAbortedError("an earlier write failed")
        try:
            job(*arguments)
        except OSError:
            self._broken = True
            raise

    def send(self, message: wire.Message, payload: Any = b"") -> None:
        """Send a frame. Only for jobs: blocks, in the thread.

        Raises:
            OSError: the connection broke, or made no progress in time.
        """
        size = len(payload)
        head = wire.frame(message, size)
        sent = self._socket.sendmsg([head, payload]) if size else self._socket.send(head)
        if sent < len(head):
            self._socket.sendall(memoryview(head)[sent:])
            sent = len(head)
        if sent < len(head) + size:
            self._socket.sendall(memoryview(payload)[sent - len(head) :])

    def lose(self, reason: PeerLost) -> None:
        """Give the connection up: every writer hears why, and the thread ends."""
        if self.lost is not None:
            return
        self.lost = reason
        if not self.welcomed.done():
            self.welcomed.set_exception(reason)
        elif not self.welcomed.cancelled():
            self._mourn(self._endpoint, reason)
        for listener in list(self._listeners.values()):
            listener.lost(reason)
        self._listeners.clear()
        self.backlog.open()
        if self._transport is None:
            self.ended.set_result(None)
        else:
            self._hang_up()
        self._thread.shutdown(wait=False)

    def _hang_up(self) -> None:
        assert self._transport is not None
        with contextlib.suppress(OSError):  # the peer may have closed it before us
            self._socket.shutdown(socket.SHUT_RDWR)
        self._transport.close()
        # Whatever was queued fails at once now; the thread closes its socket after that.
        closing = self._loop.run_in_executor(self._thread, self._socket.close)
        closing.add_done_callback(lambda _: self.ended.set_result(None))

    def _take_message(self) -> wire.ToSender | None:
        """The next message, if all of it is here."""
        if len(self._received) < wire.PREFIX.size:
            return None
        size, payload = wire.PREFIX.unpack_from(self._received)
        if payload or not 0 < size <= wire.MAX_MESSAGE_BYTES:
            raise PeerMisbehaved(f"a message of {size} bytes with a payload of {payload}")
        end = wire.PREFIX.size + size
        if len(self._received) < end:
            return None
        body = bytes(self._received[wire.PREFIX.size : end])
        del self._received[:end]
        return wire.to_sender(body)

    def _hear(self, message: wire.ToSender) -> None:
        if isinstance(message, wire.Denied):
            self.lose(PeerLost(f"{self._endpoint.address} refused us: {message.reason}"))
        elif isinstance(message, wire.Welcome):
            if not self.welcomed.done():
                self.welcomed.set_result(None)
        elif listener := self._listeners.get(message.ticket):
            listener.answered(message)


class _Echo:
    """A listener that waits for one answer."""

    def __init__(self, heard: asyncio.Future[None]) -> None:
        self.heard = heard

    def answered(self, answer: wire.Answer) -> None:
        if not self.heard.done():
            self.heard.set_result(None)

    def lost(self, reason: PeerLost) -> None:
        if not self.heard.done():
            self.heard.set_exception(reason)


class Backlog:
    """A bound on how much is queued. One that was taken while nothing is queued may exceed it."""

    def __init__(self, limit: int) -> None:
        """Begin empty."""
        self._limit = limit
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open = False

    async def take(self, amount: int) -> None:
        """Wait for room, first come first served, and take it."""
        while self._used and self._used + amount > self._limit and not self._open:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(room)
            try:
                await room
            finally:
                if room in self._waiting:
                    self._waiting.remove(room)
        self._used += amount

    def give(self, amount: int) -> None:
        """Make room."""
        self._used -= amount
        self._wake()

    def open(self) -> None:
        """Let everyone pass: the connection is lost, and they will see that."""
        self._open = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for room in waiting:
            if not room.done():
                room.set_result(None)
