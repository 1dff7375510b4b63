"""Where one sender asks the receiver: a thread that answers, and copies from the arena."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from transfer.errors import PeerMisbehaved
from transfer.nixl import wire
from transfer.session.handoff import Handoff, Peer, Presence


class Reception(Protocol):
    """What a desk needs of the receiver."""

    def admit(self, handoff: Handoff, *, direct: bool) -> wire.There:
        """Somebody will write to a landing, by himself if `direct`: where does it lie?"""

    def busy(self, peer: Peer, writing: bool) -> None:
        """Whether `peer` writes to the arena outside of handoffs."""

    def left(self, handoff: Handoff) -> None:
        """A copy into a landing has ended that takes no more writes."""


class Desk:
    """One sender's. `run` serves it; `cut` and `busy_with` are for others."""

    def __init__(self, reception: Reception, peer: Peer, arena: NDArray[np.uint8]) -> None:
        """Prepare, with the slots that were lent to `peer`."""
        self._reception = reception
        self._peer = peer
        self._arena = arena
        self._lock = threading.Lock()
        self._presence = Presence(reception.left)
        self._connection: socket.socket | None = None
        self._was_cut = False

    def run(self, connection: socket.socket, stall_seconds: float) -> None:
        """Serve `connection` until it is closed.

        Raises:
            PeerMisbehaved: a message is not allowed.
            PeerLost: the session has ended.
            OSError: the connection broke.
        """
        connection.settimeout(None)
        with self._lock:
            self._connection = connection
            if self._was_cut:
                return
        while (message := wire.hear_sender(connection)) is not None:
            if isinstance(message, wire.Busy):
                self._reception.busy(self._peer, message.writing)
                continue
            handoff = self._peer.find(message.ticket, stall_seconds)
            if isinstance(message, wire.Ingest):
                self._ingest(handoff, message)
                wire.say(connection, wire.Ingested(message.slot))
            elif handoff is None:
                wire.say(connection, wire.There())
            else:
                wire.say(connection, self._reception.admit(handoff, direct=message.direct))

    def cut(self) -> None:
        """Have `run` end soon. Does not block."""
        with self._lock:
            self._was_cut = True
            if self._connection is not None:
                with contextlib.suppress(OSError):  # the peer may have closed it before us
                    self._connection.shutdown(socket.SHUT_RDWR)

    def busy_with(self, handoff: Handoff) -> bool:
        """Whether something is being copied into the landing of `handoff`."""
        return self._presence.within(handoff)

    def _ingest(self, handoff: Handoff | None, message: wire.Ingest) -> None:
        offsets, lengths = wire.runs_of(message)
        entry = handoff.live if handoff is not None else None
        if handoff is None or entry is None:
            return
        entry.check(offsets, lengths)
        if not message.slot < wire.SLOTS:
            raise PeerMisbehaved(f"slot {message.slot} of {wire.SLOTS}")
        first = message.slot * wire.SLOT_BYTES
        data = self._arena[first : first + int(lengths.sum())]
        if self._presence.enter(handoff):
            try:
                entry.put(data, offsets, lengths)
            finally:
                self._presence.leave(handoff)
