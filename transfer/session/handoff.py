"""One ticket of one session, as the receiver sees it, and the session that it belongs to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from transfer.landings import Expected
from transfer.session import wire


class Peer(Protocol):
    """A sender that was welcomed; compared by identity."""

    loop: asyncio.AbstractEventLoop
    connection: socket.socket
    """The session's own. Not to be read or written; says who the peer is (`SO_PEERCRED`)."""

    @property
    def gone(self) -> bool:
        """Whether the session has ended."""

    def find(self, ticket: int, seconds: float) -> Handoff | None:
        """The handoff of a ticket, waiting for its `Open` up to `seconds`; blocks, any thread.

        None if it has ended.

        Raises:
            PeerMisbehaved: it was not opened in time.
            PeerLost: the session has ended.
        """

    def drop(self, reason: Exception) -> None:
        """End the session, from any thread. Its landings fail with `reason`."""


class Summed(Protocol):
    """What an intake through which all bytes of a handoff come knows of them."""

    def digest(self) -> bytes | None:
        """Once everything has arrived: what `Expected.digest` gives, but for what was present.

        None if that must be computed.
        """


class Handoff:
    """What is known of one ticket. `entry` is None where the landing was refused at once.

    Made, ended and released on the event loop; `live` may be asked in any thread.
    """

    def __init__(self, ticket: int, peer: Peer, say: Callable[[wire.Message], None]) -> None:
        """Enter a ticket; `say` reaches its sender, or nobody if that is gone.

        `summed` is the intake's to set.
        """
        self.ticket = ticket
        self.peer = peer
        self.entry: Expected | None = None
        self.summed: Summed | None = None
        self.quiet: asyncio.Future[None] = peer.loop.create_future()
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

    def released(self) -> None:
        """No write of this handoff can land any more. Safe to call twice."""
        if not self.quiet.done():
            self.quiet.set_result(None)


class Presence:
    """Which landing one thread is copying into, so that a withdrawal knows whether to wait for it.

    `left` is called, in that thread, when a copy into a landing has ended that meanwhile takes no
    more writes.
    """

    def __init__(self, left: Callable[[Handoff], None]) -> None:
        """Begin outside of every landing."""
        self._left = left
        self._lock = threading.Lock()
        self._inside: Handoff | None = None

    def enter(self, handoff: Handoff) -> bool:
        """Begin to copy; false, and nothing may be copied, if the landing takes no more writes."""
        with self._lock:
            if handoff.live is None:
                return False
            self._inside = handoff
            return True

    def leave(self, handoff: Handoff) -> None:
        """The copy has ended."""
        with self._lock:
            self._inside = None
        if handoff.live is None:
            self._left(handoff)

    def within(self, handoff: Handoff) -> bool:
        """Whether something is being copied into the landing of `handoff`. Any thread."""
        with self._lock:
            return self._inside is handoff
