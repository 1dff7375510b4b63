"""The sender's end of one session: a stream that hears answers, a thread that moves bytes.

The thread works jobs off in their order, so that whatever is submitted later happens later; the
event loop is never kept from its other work.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from transfer.errors import PeerLost, TransferError
from transfer.layout import Endpoint
from transfer.session import wire
from transfer.session.meeting import Acquaintance
from transfer.session.stream import Stream

Job = Callable[[], None]

log = structlog.get_logger(__name__)


class Listener(Protocol):
    """Hears, on the event loop, what becomes of one ticket."""

    def granted(self) -> None:
        """The receiver knows the writer."""

    def answered(self, answer: wire.Answer) -> None:
        """The receiver said how the handoff ended."""

    def lost(self, reason: PeerLost) -> None:
        """The session has ended."""


class Session:
    """One session, from the welcome on, until it is lost; then it stays lost."""

    def __init__(
        self,
        endpoint: Endpoint,
        acquaintance: Acquaintance,
        *,
        backlog_bytes: int,
        stall_seconds: float,
        mourn: Callable[[PeerLost], None],
    ) -> None:
        """Own what the meeting brought from now on.

        `next_ticket` is the number of the next handoff; once `broken`, nothing is moved any more.
        `mourn` is called when the session is lost.
        """
        self.mover = acquaintance.mover
        self.digest = acquaintance.digest
        self.stall_seconds = stall_seconds
        self.backlog = Backlog(backlog_bytes)
        self.lost: PeerLost | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._endpoint = endpoint
        self.next_ticket = 0
        self.broken = False
        self._mourn = mourn
        self._echoes: dict[int, asyncio.Future[None]] = {}
        self._listeners: dict[int, Listener] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, name=f"kv-send-{endpoint.address}", daemon=True
        )
        self._stream = Stream(
            acquaintance.connection,
            stall_seconds=stall_seconds,
            peer_stall_seconds=acquaintance.patience_seconds,
            hear=self._hear,
            lost=self._stream_lost,
        )
        self._thread.start()

    # ---- what writers call ------------------------------------------------------------------

    def enter(self, listener: Listener) -> None:
        """Give `next_ticket` to a listener. Its `Open` must be sent before the next is given.

        Raises:
            PeerLost: the session is lost.
        """
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        self._listeners[self.next_ticket] = listener
        self.next_ticket += 1

    def leave(self, ticket: int) -> None:
        """Hear no more of a ticket."""
        self._listeners.pop(ticket, None)

    async def round_trip(self) -> float:
        """Seconds until a message is said back.

        Raises:
            PeerLost: the session is lost.
        """
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        number = len(self._echoes)
        while number in self._echoes:
            number += 1
        heard = self._echoes[number] = self._loop.create_future()
        begun = time.monotonic()
        self.send(wire.Echo(number))
        try:
            await heard
        finally:
            del self._echoes[number]
        return time.monotonic() - begun

    async def bytes_per_second(self) -> float:
        """As `Mover.probe`.

        Raises:
            PeerLost: the session is lost.
        """
        if self.lost is not None:
            raise PeerLost(str(self.lost))  # and the thread may have ended
        measured: asyncio.Future[float] = self._loop.create_future()

        def measure() -> None:
            try:
                rate = self.mover.probe() if not self.broken else 0.0
            except OSError as error:
                rate = 0.0
                self.break_down(PeerLost(f"a probe failed: {error!r}"))
            self.call_soon(_deliver, measured, rate)

        self.submit(measure)
        rate = await measured
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        return rate

    def submit(self, job: Job) -> None:
        """Have the thread do `job`, after all earlier ones; also when the session is lost.

        `job` handles its own errors; what it raises all the same ends the session.
        """
        self._jobs.put(job)

    def send(self, message: wire.Message) -> None:
        """Send a message, from any thread; in vain once the session is lost."""
        self._stream.send(message)

    def call_soon(self, what: Callable[..., object], *arguments: object) -> None:
        """From the thread: have the event loop do something."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everything with it
            self._loop.call_soon_threadsafe(what, *arguments)

    def break_down(self, reason: PeerLost) -> None:
        """From the thread: a write failed half-way, so there must not be another."""
        self.broken = True
        self.call_soon(self.lose, reason)

    def lose(self, reason: PeerLost) -> None:
        """Give the session up: every writer hears why, releases what it holds, the thread ends.

        The connection is closed last, so that the receiver hears of what was released.
        """
        if self.lost is not None:
            return
        self.lost = reason
        self.broken = True
        for listener in list(self._listeners.values()):
            listener.lost(reason)
        for echo in self._echoes.values():
            if not echo.done():
                echo.set_exception(reason)
        self.backlog.open()
        self.mover.cut()
        self._jobs.put(None)
        self._mourn(reason)

    # ---- what the stream tells --------------------------------------------------------------

    def _stream_lost(self, reason: TransferError) -> None:
        kind = "closed the connection" if isinstance(reason, PeerLost) else "misbehaved"
        self.lose(PeerLost(f"{self._endpoint.address} {kind}: {reason}"))

    def _hear(self, body: bytes) -> None:
        message = wire.to_sender(body)
        if isinstance(message, wire.Alive):
            return
        if isinstance(message, wire.Echo):
            if (echo := self._echoes.get(message.number)) and not echo.done():
                echo.set_result(None)
            return
        listener = self._listeners.get(message.ticket)
        if listener is None:
            return
        if isinstance(message, wire.Granted):
            listener.granted()
        else:
            listener.answered(message)

    # ---- the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # or nothing would be released any more
                log.exception("session.failed", peer=self._endpoint.address)
                self.break_down(PeerLost(f"this end failed: {error!r}"))
        self.mover.close()
        self.call_soon(self._end)

    def _end(self) -> None:
        assert self.lost is not None
        self._stream.end(self.lost)
        if not self.ended.done():
            self.ended.set_result(None)


def _deliver(measured: asyncio.Future[float], rate: float) -> None:
    if not measured.done():
        measured.set_result(rate)


class Backlog:
    """A bound on how much is queued. One that was taken while nothing is queued may exceed it."""

    def __init__(self, limit: int) -> None:
        """Begin empty."""
        self._limit = limit
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._open = False

    async def take(self, amount: int) -> None:
        """Wait for room, first come first served, and take it."""
        while (room := self._enter(amount)) is not None:
            try:
                await room
            finally:
                with self._lock:
                    if room in self._waiting:
                        self._waiting.remove(room)

    def give(self, amount: int) -> None:
        """Make room, from any thread."""
        with self._lock:
            self._used -= amount
            waiting = bool(self._waiting)
        if waiting:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def open(self) -> None:
        """Let everyone pass: the session is lost, and they will see that."""
        self._open = True
        self._wake()

    def _enter(self, amount: int) -> asyncio.Future[None] | None:
        """Take `amount`, or stand in the queue."""
        with self._lock:
            if not self._used or self._used + amount <= self._limit or self._open:
                self._used += amount
                return None
            room: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(room)
            return room

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
        for room in waiting:
            if not room.done():
                room.set_result(None)
