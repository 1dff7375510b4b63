"""The receiver's end of one session: tickets, and what becomes of them. Runs on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Protocol

import structlog

from transfer.errors import LandingGone, PeerLost, PeerMisbehaved, TransferError
from transfer.landings import Expected, Landings
from transfer.session import wire
from transfer.session.handoff import Handoff
from transfer.session.mover import Intake
from transfer.session.stream import Stream

WAITS = 4
"""A wait is cut into so many: a process that was stopped must not find all of its time over."""

log = structlog.get_logger(__name__)


class House(Protocol):
    """What a session needs of the receiver that welcomed it."""

    stall_seconds: float
    landings: Landings
    intake: Intake

    def verify(self, handoff: Handoff, entry: Expected, commit: wire.Commit) -> None:
        """Compute the digest in a thread, then settle the landing and answer."""

    def claimed(self, handoff: Handoff) -> None:
        """From now on `quiesce` of its landing waits for this handoff."""

    def prepare(self, handoff: Handoff) -> None:
        """Its bytes will come soon."""

    def left(self, incoming: Incoming) -> None:
        """The session has ended."""


class Incoming:
    """One sender that was welcomed; a `Peer` to the transport's intake."""

    def __init__(
        self,
        house: House,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        token: bytes,
        patience_seconds: float,
    ) -> None:
        """Prepare, in any thread; `start` begins to listen.

        The sender takes us for lost after `patience_seconds` of silence.
        """
        self.loop = loop
        self.token = token
        self.connection = connection
        self._house = house
        self._patience_seconds = patience_seconds
        self._stream: Stream | None = None
        self._ended: TransferError | None = None
        self._handoffs: dict[int, Handoff] = {}
        self._opened = 0
        self._opening = threading.Condition()

    def start(self) -> None:
        """Listen from now on, on the event loop."""
        if self._ended is not None:  # what joined it was quicker, and misbehaved
            self.connection.close()
            return
        self._stream = Stream(
            self.connection,
            stall_seconds=self._house.stall_seconds,
            peer_stall_seconds=self._patience_seconds,
            hear=self._hear,
            lost=self._lost,
        )

    # ---- what a transport asks --------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """As `Peer.gone`."""
        return self._ended is not None

    def find(self, ticket: int, seconds: float) -> Handoff | None:
        """As `Peer.find`."""
        known = False
        with self._opening:
            for _ in range(WAITS):
                known = known or self._opening.wait_for(
                    lambda: ticket < self._opened or self._ended is not None, seconds / WAITS
                )
        if self._ended is not None:
            raise PeerLost(f"the session has ended: {self._ended}")
        if not known:
            raise PeerMisbehaved(f"ticket {ticket} was not opened in time")
        return self._handoffs.get(ticket)

    def drop(self, reason: Exception) -> None:
        """As `Peer.drop`."""
        error = reason if isinstance(reason, TransferError) else PeerLost(str(reason))
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.end, error)

    def end(self, reason: TransferError) -> None:
        """End the session now."""
        if self._stream is not None:
            self._stream.end(reason)
        else:
            self._lost(reason)

    # ---- what the stream tells --------------------------------------------------------------

    def _lost(self, reason: TransferError) -> None:
        if self._ended is not None:
            return
        with self._opening:
            self._ended = reason
            self._opening.notify_all()
        if isinstance(reason, PeerMisbehaved):
            log.warning("peer.misbehaved", reason=str(reason))
        for handoff in self._handoffs.values():
            self._stop(handoff, reason)
        unquiet = [it for it in self._handoffs.values() if not it.quiet.done()]
        self._handoffs.clear()
        self._house.left(self)
        self._house.intake.parted(self, unquiet)

    def _hear(self, body: bytes) -> None:
        message = wire.to_receiver(body)
        if isinstance(message, wire.Alive):
            return
        if isinstance(message, wire.Open):
            self._open(message)
            return
        if isinstance(message, wire.Echo):
            self._say(message)
            return
        handoff = self._handoffs.get(message.ticket)
        if handoff is None:
            if message.ticket >= self._opened:
                raise PeerMisbehaved(f"ticket {message.ticket} was never opened")
        elif isinstance(message, wire.Touch):
            if entry := handoff.live:
                entry.touched()
        elif isinstance(message, wire.Commit):
            self._commit(handoff, message)
        else:
            self._release(handoff, lost=message.lost)

    def _open(self, message: wire.Open) -> None:
        if message.ticket != self._opened or len(self._handoffs) >= wire.MAX_TICKETS:
            raise PeerMisbehaved(f"ticket {message.ticket} after {self._opened}, or one too many")
        handoff = Handoff(message.ticket, self, self._say)
        try:
            handoff.entry = self._house.landings.claim(
                message.landing,
                message.epoch,
                message.secret,
                handoff,
                message.place if message.ask else None,
            )
        except LandingGone as error:
            handoff.end("gone", str(error))
            handoff.released()
        else:
            self._house.claimed(handoff)
        with self._opening:
            self._handoffs[message.ticket] = handoff
            self._opened += 1
            self._opening.notify_all()
        if handoff.live is not None:
            if message.ask:
                self._say(wire.Granted(message.ticket))
            self._house.prepare(handoff)

    def _commit(self, handoff: Handoff, message: wire.Commit) -> None:
        entry = handoff.live
        if entry is None:
            handoff.end("gone", "the landing is gone")
            return

        def complete() -> None:
            if entry.state == "open":
                self._house.verify(handoff, entry, message)

        self._house.intake.complete(handoff, message.proof, complete)

    def _release(self, handoff: Handoff, *, lost: bool) -> None:
        """The sender gave it up, or knows that its landing is gone."""
        del self._handoffs[handoff.ticket]
        gave_up, ended = LandingGone("the sender gave up"), PeerLost("the sender ends the session")
        self._stop(handoff, ended if lost else gave_up)
        if not handoff.quiet.done():
            self._house.intake.acknowledged(handoff)

    def _stop(self, handoff: Handoff, reason: TransferError) -> None:
        if entry := handoff.live:
            entry.fail(reason)
            self._house.landings.forget(entry)
            self._house.intake.stopped(handoff)

    def _say(self, message: wire.Message) -> None:
        if self._stream is not None:
            self._stream.send(message)
