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

from transfer.kernels import Tiles
from transfer.landings import Expected
from transfer.rows import scatter
from transfer.session.handoff import Handoff, Peer, Presence
from transfer.sockets import I64, Places, raise_for
from transfer.taking import DUE, NOTHING, UNLIKE, begin, take
from transfer.tcp import wire
from transfer.tcp.arrivals import Arrivals

DIRECT_BYTES = 4 << 10
"""Runs at least this long, on average, are received in place, shorter ones via a staging copy."""

WAKE_BYTES = 128 << 10
"""How much of a frame must be there for the thread to wake up: it does not for every packet."""

_LATER = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Reception(Protocol):
    """Whom a lane tells, from its thread."""

    def arrivals(self, handoff: Handoff, entry: Expected) -> Arrivals:
        """The account of a handoff, which `entry` is the landing of."""

    def arrived(self, handoff: Handoff, arrivals: Arrivals, count: int) -> None:
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
        head = wire.read_head(self._head)
        table = memoryview(bytearray(head.runs * wire.RUN_BYTES))
        self._fill(table)
        if head.ticket == wire.NOBODY:
            self._discard(head.payload_bytes)
            self._connection.send(b"!")
            return
        handoff = self._peer.find(head.ticket, self._stall_seconds)
        entry = handoff.live if handoff is not None else None
        if handoff is None or entry is None:
            self._discard(head.payload_bytes)
            return
        arrivals = self._reception.arrivals(handoff, entry)
        part, size, fresh = head.part, head.payload_bytes, False
        if part is not None:
            addresses, lengths = arrivals.places(part, size)
            fresh = arrivals.claim(part)
        else:
            offsets, lengths = wire.runs_of(table, size)
            entry.check(offsets, lengths)
            addresses = entry.pool.addresses(offsets)
            arrivals.void()
        tiles = None
        if size < DIRECT_BYTES * len(lengths) or self._encrypted:
            self._stage(handoff, addresses, lengths, size)
        else:
            tiles = arrivals.tiles(part) if fresh and part is not None else None
            if not self._receive(handoff, Places(addresses, lengths), tiles):
                arrivals.void()
        if fresh and part is not None:
            (arrivals.hash if tiles is None else arrivals.hashed)(part)
        self._reception.arrived(handoff, arrivals, size)

    def _stage(self, handoff: Handoff, addresses: I64, lengths: I64, size: int) -> None:
        if len(self._staging) < size:
            self._staging = memoryview(bytearray(size))
        data = self._staging[:size]
        self._fill(data)
        if self._presence.enter(handoff):
            try:
                scatter(data, addresses, lengths)
            finally:
                self._presence.leave(handoff)

    def _receive(self, handoff: Handoff, places: Places, tiles: Tiles | None) -> bool:
        """Read straight into the pool, and hash `tiles`; whether that is what was hashed."""
        hashed = begin(tiles[2], places.left) if tiles is not None else NOTHING
        while places.left:
            if not self._presence.enter(handoff):
                self._discard(places.left)
                return False
            try:
                if tiles is None:
                    places.receive(self._connection)
                else:
                    told = (*places.table, hashed, *tiles)
                    found = take(self._connection.fileno(), *told)
                    if found == UNLIKE:
                        tiles = None
                    else:
                        raise_for(found)
                dry = False
            except BlockingIOError:
                dry = True
            finally:
                self._presence.leave(handoff)
            if dry:
                self._wait_for(min(places.left, WAKE_BYTES))
        return hashed is NOTHING or (tiles is not None and not hashed[DUE])

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

    def _wait_for(self, count: int) -> None:
        """Wait until so many bytes are there."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        try:
            self._wait()
        finally:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _wait(self, *, idle: bool = False) -> None:
        while not self._poll.poll(self._stall_seconds * 1000):
            if not idle:
                raise TimeoutError(f"a frame stood still for {self._stall_seconds} s")
