"""One connection at the receiving end: prefix, message, payload, and again.

Bytes of a run are read straight into the pool after the run was checked against its landing.
Nothing is allocated for a length that was not bounded first, and whatever the protocol does not
allow closes this connection and no other.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from transfer.errors import LandingGone, PeerLost, PeerMisbehaved, TransferError
from transfer.landings import Expected, Landings
from transfer.layout import KVLayout
from transfer.rows import scatter
from transfer.tcp import wire

SCRATCH_BYTES = 256 << 10
DIRECT_BYTES = 4 << 10
"""Runs at least this long, on average, are received in place, shorter ones via a staging copy."""

log = structlog.get_logger(__name__)


class Reception(Protocol):
    """What a connection needs of the receiver that accepted it."""

    layout: KVLayout
    secret: bytes
    stall_seconds: float
    landings: Landings
    scratch: memoryview

    def verify(self, handoff: Handoff, entry: Expected, commit: wire.Commit) -> None:
        """Compute the digest in a thread, then settle the landing and answer."""


class Handoff:
    """One ticket on one connection. `entry` is None where the landing was refused at once."""

    def __init__(self, ticket: int, say: Callable[[wire.Message], None]) -> None:
        self.ticket = ticket
        self.entry: Expected | None = None
        self._say = say
        self._ended = False

    @property
    def live(self) -> Expected | None:
        """The landing, while it may be written to."""
        return self.entry if self.entry is not None and self.entry.state == "open" else None

    def end(
        self,
        outcome: wire.Outcome,
        detail: str = "",
        *,
        verify_seconds: float = 0.0,
        size: int = 0,
        answer: bytes = b"",
    ) -> None:
        """Tell the sender, once, how this ended; in vain if the connection is lost."""
        if not self._ended:
            self._ended = True
            detail = detail[: wire.MAX_DETAIL]
            self._say(wire.Answer(self.ticket, outcome, detail, verify_seconds, size, answer))

    def put_down(self) -> None:
        """Answer an abort, whatever was said before."""
        self._ended = True
        self._say(wire.Answer(self.ticket, "aborted"))


class Incoming(asyncio.BufferedProtocol):
    """One connection: prefix, message, payload, and again."""

    def __init__(self, receiver: Reception, *, crowded: bool) -> None:
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._receiver = receiver
        self._crowded = crowded
        self._transport: asyncio.Transport | None = None
        self._welcomed = False
        self._reason: TransferError = PeerLost("the sender closed the connection")
        self._handoffs: dict[int, Handoff] = {}
        self._prefix = memoryview(bytearray(wire.PREFIX.size))
        self._payload_bytes = 0
        self._writing: Expected | None = None
        self._runs: list[tuple[int, int]] = []
        self._left = 0
        self._begin(self._prefix, self._read_prefix)

    # ---- what asyncio calls -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast("asyncio.Transport", transport)  # uvloop's does not inherit
        self._transport = made
        # Answers are small: one that piles up behind this is not being read.
        made.set_write_buffer_limits(high=4 * wire.MAX_NOTE_BYTES)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(self._receiver.stall_seconds, self._lose_patience)
        try:
            with wire.twin(transport) as sock:
                wire.notice_death(sock, self._receiver.stall_seconds)
        except OSError as error:
            self.deny(f"no socket: {error}")
        if self._crowded:
            self.deny("too many connections")

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._writing is not None and self._writing.state != "open":
            self._discard(self._left - self._filled)
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._view):
            return
        try:
            self._then()
        except PeerMisbehaved as error:
            log.warning("peer.misbehaved", reason=str(error))
            self._reason = error
            self.drop()

    def pause_writing(self) -> None:
        self._reason = PeerMisbehaved("the sender does not read its answers")
        self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        for handoff in self._handoffs.values():
            if entry := handoff.live:
                self._fail(entry, self._reason)
        self._handoffs.clear()
        self.closed.set_result(None)

    # ---- speaking ---------------------------------------------------------------------------

    def say(self, message: wire.Message) -> None:
        """Send one message, unless the connection is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.frame(message))

    def deny(self, reason: str) -> None:
        """Refuse the connection with a reason, then close it."""
        self.say(wire.Denied(reason))
        if self._transport is not None:
            self._transport.close()

    def drop(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _lose_patience(self) -> None:
        if not self._welcomed:
            self.deny("no greeting in time")

    # ---- reading frames ---------------------------------------------------------------------

    def _begin(self, view: memoryview, then: Callable[[], None]) -> None:
        """Fill `view`, then call `then`."""
        self._view, self._filled, self._then = view, 0, then

    def _next_frame(self) -> None:
        self._writing = None
        self._begin(self._prefix, self._read_prefix)

    def _read_prefix(self) -> None:
        message_bytes, self._payload_bytes = wire.PREFIX.unpack(self._prefix)
        most = wire.MAX_MESSAGE_BYTES if self._welcomed else wire.MAX_STRANGER_BYTES
        if not 0 < message_bytes <= most:
            raise PeerMisbehaved(f"a message of {message_bytes} bytes")
        if self._payload_bytes > wire.MAX_PAYLOAD_BYTES:
            raise PeerMisbehaved(f"a payload of {self._payload_bytes} bytes")
        self._begin(memoryview(bytearray(message_bytes)), self._read_message)

    def _read_message(self) -> None:
        message = wire.to_receiver(self._view)
        if isinstance(message, wire.Write):
            self._write(message)
            return
        if self._payload_bytes:
            raise PeerMisbehaved(f"{type(message).__name__} with a payload")
        if isinstance(message, wire.Hello):
            self._greet(message)
        elif not self._welcomed:
            raise PeerMisbehaved(f"{type(message).__name__} before Hello")
        elif isinstance(message, wire.Open):
            self._open(message)
        elif isinstance(message, wire.Commit):
            self._commit(message)
        else:
            self._abort(message)
        self._next_frame()

    def _greet(self, hello: wire.Hello) -> None:
        if self._welcomed:
            raise PeerMisbehaved("a second Hello")
        receiver = self._receiver
        if hello.version != wire.VERSION:
            self.deny(f"version {hello.version} of the protocol, here it is {wire.VERSION}")
        elif not hmac.compare_digest(hello.secret, receiver.secret):
            self.deny("wrong shared secret")
        elif hello.fingerprint != receiver.layout.fingerprint:
            self.deny(f"layout {hello.fingerprint}, here it is {receiver.layout.fingerprint}")
        else:
            self._welcomed = True
            self._patience.cancel()
            self.say(wire.Welcome(wire.VERSION))

    def _open(self, message: wire.Open) -> None:
        if message.ticket in self._handoffs or len(self._handoffs) >= wire.MAX_TICKETS:
            raise PeerMisbehaved(f"ticket {message.ticket} is taken, or one too many")
        handoff = self._handoffs[message.ticket] = Handoff(message.ticket, self.say)
        try:
            handoff.entry = self._receiver.landings.claim(
                message.landing, message.epoch, message.secret, handoff
            )
        except LandingGone as error:
            handoff.end("gone", str(error))

    def _handoff(self, ticket: int) -> Handoff:
        handoff = self._handoffs.get(ticket)
        if handoff is None:
            raise PeerMisbehaved(f"ticket {ticket} was never opened")
        return handoff

    def _commit(self, message: wire.Commit) -> None:
        handoff = self._handoff(message.ticket)
        del self._handoffs[message.ticket]
        if entry := handoff.live:
            self._receiver.verify(handoff, entry, message)
        else:
            handoff.end("gone", "the landing is gone")

    def _abort(self, message: wire.Abort) -> None:
        handoff = self._handoffs.pop(message.ticket, None)
        if handoff is None:  # its commit is here already, but the sender would not wait for it
            self.say(wire.Answer(message.ticket, "aborted"))
            return
        if entry := handoff.live:
            self._fail(entry, LandingGone("the sender gave up"))
        handoff.put_down()

    def _fail(self, entry: Expected, reason: TransferError) -> None:
        entry.fail(reason)
        self._receiver.landings.forget(entry)

    # ---- reading a payload ------------------------------------------------------------------

    def _write(self, message: wire.Write) -> None:
        if not self._welcomed:
            raise PeerMisbehaved("Write before Hello")
        entry = self._handoff(message.ticket).live
        offsets, lengths = wire.runs_of(message, self._payload_bytes)
        if entry is None:
            self._discard(self._payload_bytes)
            return
        entry.check(offsets, lengths)
        entry.touched()
        self._writing, self._left = entry, self._payload_bytes
        if self._payload_bytes < DIRECT_BYTES * len(offsets):
            scattered = partial(self._scatter, entry, offsets, lengths)
            self._begin(memoryview(bytearray(self._payload_bytes)), scattered)
        else:
            self._runs = list(zip(offsets.tolist(), lengths.tolist(), strict=True))
            self._runs.reverse()
            self._next_run(entry)

    def _next_run(self, entry: Expected) -> None:
        if not self._runs:
            self._next_frame()
            return
        offset, length = self._runs.pop()
        self._begin(entry.memory[offset : offset + length], partial(self._end_run, entry, length))

    def _end_run(self, entry: Expected, length: int) -> None:
        self._left -= length
        self._next_run(entry)

    def _scatter(
        self, entry: Expected, offsets: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        # Withdrawn between the last read and now it cannot be: both happen in one callback.
        scatter(self._view, entry.bytes, offsets, lengths)
        self._next_frame()

    def _discard(self, count: int) -> None:
        """Read the rest of this payload into scratch: its landing is over."""
        self._writing = None
        self._runs = []
        if not count:
            self._next_frame()
            return
        some = min(count, SCRATCH_BYTES)
        self._begin(self._receiver.scratch[:some], partial(self._discard, count - some))
