"""One data connection at the receiving end: a thread that brings runs to where they may lie.

Long runs are read by the kernel straight into the pool, short ones via a staging copy, and both
only while they are noted as present: never while the socket is waited for, so that a landing that
is withdrawn is quiet as soon as the copy that is under way has ended, whatever the sender does.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from transfer.landings import Expected
from transfer.session.handoff import Handoff, Peer, Presence
from transfer.tcp import wire
from transfer.tcp.vectored import Places

DIRECT_BYTES = 4 << 10
"""Runs at least this long, on average, are received in place, shorter ones via a staging copy."""

GROUP_BYTES = 256 << 10
"""What is read at once, so that the sender may go on meanwhile."""

_LATER = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Runs = NDArray[np.int64]


class Reception(Protocol):
    """Whom a lane tells, from its thread."""

    def arrived(self, handoff: Handoff, count: int) -> None:
        """So many bytes of payload have been dealt with.

        Raises:
            PeerMisbehaved: they are more than were committed.
        """

    def left(self, handoff: Handoff) -> None:
        """A copy into a landing has ended that takes no more writes."""


class Lane:
    """One data connection of `peer`. `run` serves it; `cut` and `busy_with` are for others."""

    def __init__(
        self, reception: Reception, peer: Peer, connection: socket.socket, stall_seconds: float
    ) -> None:
        """Prepare; the connection stays the caller's."""
        self._reception = reception
        self._peer = peer
        self._connection = connection
        self._stall_seconds = stall_seconds
        self._presence = Presence(reception.left)
        self._head = memoryview(bytearray(wire.HEAD.size))
        self._staging = memoryview(bytearray(wire.MAX_PAYLOAD_BYTES))
        self._encrypted = isinstance(connection, ssl.SSLSocket)
        self._poll = select.poll()

    def run(self) -> None:
        """Serve the connection until it is closed between two frames.

        Raises:
            PeerMisbehaved: a frame is not allowed.
            PeerLost: the session has ended.
            OSError: the connection broke, or stood still within a frame.
        """
        self._connection.setblocking(False)
        self._poll.register(self._connection, select.POLLIN)
        while self._next():
            self._frame()

    def cut(self) -> None:
        """Have `run` end soon."""
        with contextlib.suppress(OSError):  # the peer may have closed it before us
            self._connection.shutdown(socket.SHUT_RDWR)

    def busy_with(self, handoff: Handoff) -> bool:
        """Whether something is being copied into the landing of `handoff`."""
        return self._presence.within(handoff)

    # ---- frames -----------------------------------------------------------------------------

    def _frame(self) -> None:
        ticket, runs, size = wire.measures(self._head)
        table = memoryview(bytearray(runs * wire.RUN_BYTES))
        self._fill(table)
        offsets, lengths = wire.runs_of(table, size)
        if ticket == wire.NOBODY:
            self._discard(size)
            self._connection.send(b"!")
            return
        handoff = self._peer.find(ticket, self._stall_seconds)
        entry = handoff.live if handoff is not None else None
        if handoff is None or entry is None:
            self._discard(size)
            return
        entry.check(offsets, lengths)
        if size < DIRECT_BYTES * runs or self._encrypted:
            self._stage(handoff, entry, offsets, lengths, size)
        else:
            self._receive(handoff, entry, offsets, lengths)
        self._reception.arrived(handoff, size)

    def _stage(
        self, handoff: Handoff, entry: Expected, offsets: Runs, lengths: Runs, size: int
    ) -> None:
        data = self._staging[:size]
        self._fill(data)
        if self._presence.enter(handoff):
            try:
                entry.put(data, offsets, lengths)
            finally:
                self._presence.leave(handoff)

    def _receive(self, handoff: Handoff, entry: Expected, offsets: Runs, lengths: Runs) -> None:
        places = Places(entry.pool.addresses(offsets), lengths, GROUP_BYTES)
        while places.left:
            if not self._presence.enter(handoff):
                self._discard(places.left)
                return
            try:
                places.receive(self._connection)
                dry = False
            except BlockingIOError:
                dry = True
            finally:
                self._presence.leave(handoff)
            if dry:
                self._wait()

    def _discard(self, count: int) -> None:
        """Read what nobody wants any more."""
        while count:
            some = min(count, len(self._staging))
            self._fill(self._staging[:some])
            count -= some

    # ---- the socket -------------------------------------------------------------------------

    def _next(self) -> bool:
        """Read a head; False at the end."""
        got = 0
        while got < len(self._head):
            try:
                count = self._connection.recv_into(self._head[got:])
            except _LATER:
                self._wait(idle=not got)
                continue
            if not count and not got:
                return False
            got += self._some(count)
        return True

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._try(view)
            view = view[count:]
            if not count:
                self._wait()

    def _try(self, view: memoryview) -> int:
        """Read what is there now; 0 if that is nothing."""
        try:
            return self._some(self._connection.recv_into(view))
        except _LATER:
            return 0

    def _some(self, count: int) -> int:
        if not count:
            raise ConnectionResetError("a connection was closed within a frame")
        return count

    def _wait(self, *, idle: bool = False) -> None:
        while not self._poll.poll(self._stall_seconds * 1000):
            if not idle:
                raise TimeoutError(f"a frame stood still for {self._stall_seconds} s")
