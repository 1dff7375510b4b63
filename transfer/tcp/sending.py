"""Push slices over TCP: converted and sent, frame by frame, by the session's moving thread."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

import numpy as np
from numpy.typing import NDArray

from transfer.contract import KVSlice
from transfer.convert import Conversion, Tamper
from transfer.layout import Endpoint
from transfer.session import Met, Move, Outgoing, SessionSender
from transfer.sockets import I64, Places
from transfer.tcp import wire

PROBE_FRAMES = 4

FRAME_BYTES = 1 << 20
"""About how much a frame carries: either end reads it again for its digest, out of the cache."""

DIRECT_BYTES = 1 << 10
"""Runs at least this long, on average, are sent from where they lie, shorter ones as a copy."""


class TcpSender(SessionSender):
    """A `Sender` over TCP; the arguments are those of `SessionSender`."""

    def __init__(
        self,
        *,
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        allow_unlike_weights: bool = False,
        backlog_bytes: int = 64 << 20,
        connect_seconds: float = 5.0,
        stall_seconds: float = 10.0,
    ) -> None:
        """Prepare; nothing is connected yet."""
        super().__init__(
            TcpCarrier(stall_seconds),
            secret=secret,
            tls=tls,
            allow_unlike_weights=allow_unlike_weights,
            backlog_bytes=backlog_bytes,
            connect_seconds=connect_seconds,
            stall_seconds=stall_seconds,
        )


class TcpCarrier:
    """Reaches TCP receivers. One write may make no progress for `stall_seconds`."""

    transport = "tcp"

    def __init__(self, stall_seconds: float) -> None:
        """Prepare; nothing is connected yet."""
        self._stall_seconds = stall_seconds

    def dial(self, endpoint: Endpoint, seconds: float) -> socket.socket:
        """As `Carrier.dial`."""
        connection = _dial(*wire.host_and_port(endpoint), seconds)
        wire.notice_death(connection, self._stall_seconds)
        return connection

    def hello(self, endpoint: Endpoint) -> bytes:
        """As `Carrier.hello`: nothing to say."""
        return b""

    def meet(self, met: Met) -> TcpMover:
        """As `Carrier.meet`: opens the data connection."""
        connection = met.join()
        connection.settimeout(self._stall_seconds)
        return TcpMover(connection, self._stall_seconds)

    def close(self) -> None:
        """As `Carrier.close`."""


def _dial(host: str, port: int, seconds: float) -> socket.socket:
    """As `socket.create_connection`, with a large buffer from the beginning."""
    reasons = []
    for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            wire.enlarge(connection)
            connection.settimeout(seconds)
            connection.connect(where)
        except OSError as error:
            connection.close()
            reasons.append(error)
        else:
            return connection
    raise reasons[0]


class TcpMover:
    """The data connection to one peer."""

    waits_for_grant = False  # the receiver checks each frame

    def __init__(self, connection: socket.socket, stall_seconds: float) -> None:
        """Own `connection`, which blocks, from now on."""
        self.encrypted = isinstance(connection, ssl.SSLSocket)
        self._connection = connection
        self._stall_seconds = stall_seconds
        self._poll = select.poll()
        self._poll.register(connection, select.POLLOUT)

    def begin(self, outgoing: Outgoing) -> Move:
        """As `Mover.begin`."""
        return _TcpMove(self, outgoing)

    def send(self, head: bytes, addresses: I64, lengths: I64) -> None:
        """Send a frame: its head, then what lies at `addresses`; blocks.

        Raises:
            OSError: the connection broke, or made no progress in time.
        """
        start = np.frombuffer(head, np.uint8)
        places = Places(
            np.concatenate([[start.ctypes.data], addresses]),
            np.concatenate([[len(head)], lengths]),
        )
        while places.left:
            try:
                places.send(self._connection)
            except BlockingIOError:
                if not self._poll.poll(self._stall_seconds * 1000):
                    raise TimeoutError(f"nothing was taken for {self._stall_seconds} s") from None

    def send_copy(self, head: bytes, data: NDArray[np.uint8]) -> None:
        """Send a frame: its head, then `data`; as `send`, also over TLS."""
        if self.encrypted:
            self._connection.sendall(head)
            self._connection.sendall(data.data)
        else:
            self.send(head, np.array([data.ctypes.data]), np.array([data.size]))

    def probe(self) -> float:
        """As `Mover.probe`: frames that the other end reads, answers and forgets."""
        [run] = runs = np.array([wire.MAX_PAYLOAD_BYTES], np.int64)
        head, payload = wire.head(wire.NOBODY, runs, runs, run), bytes(run)
        begun = time.monotonic()
        for _ in range(PROBE_FRAMES):
            self._connection.sendall(head)
            self._connection.sendall(payload)
        for _ in range(PROBE_FRAMES):
            if not self._connection.recv(1):
                raise ConnectionResetError("the data connection was closed")
        return float(PROBE_FRAMES * run / (time.monotonic() - begun))

    def cut(self) -> None:
        """As `Mover.cut`."""
        with contextlib.suppress(OSError):  # the peer may have closed it before us
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As `Mover.close`."""
        self._connection.close()


class _TcpMove:
    """One handoff as frames."""

    def __init__(self, mover: TcpMover, outgoing: Outgoing) -> None:
        self._mover = mover
        self._outgoing = outgoing
        self._conversion = Conversion(outgoing.plan, outgoing.source, outgoing.landing)
        self._in_place = self._conversion.verbatim and not mover.encrypted
        self._staging = np.empty(0, np.uint8)
        self._sent = 0

    def write(self, part: KVSlice) -> None:
        """As `Move.write`."""
        outgoing = self._outgoing
        for window in self._conversion.windows(part, FRAME_BYTES):
            if outgoing.over():
                return
            if outgoing.tamper is not None:
                self._send_damaged(window, outgoing.tamper)
            elif size := self._conversion.size(window):
                self._send(window, size)
            if outgoing.digest is not None:
                outgoing.digest.add(window)

    def settle(self) -> bytes:
        """As `Move.settle`: how much was sent."""
        return wire.PROOF.pack(self._sent)

    def release(self) -> None:
        """As `Move.release`: the thread that calls it is the one that would write."""

    def _send(self, window: KVSlice, size: int) -> None:
        head = wire.head_of_part(self._outgoing.ticket, window, size)
        self._sent += size
        if self._in_place and self._conversion.run_bytes(window) >= DIRECT_BYTES:
            addresses, _, lengths = self._conversion.moves(window)
            self._mover.send(head, addresses, lengths)
            return
        if self._staging.size < size:
            self._staging = np.empty(size, np.uint8)
        self._conversion.fill(window, self._staging.ctypes.data)
        self._mover.send_copy(head, self._staging[:size])

    def _send_damaged(self, window: KVSlice, tamper: Tamper) -> None:
        for frame in self._conversion.frames(window):
            shown = tamper(self._outgoing.landing.id, frame)
            if shown is not None:
                size = len(shown.data)
                head = wire.head(self._outgoing.ticket, shown.offsets, shown.lengths, size)
                self._sent += size
                self._mover.send_copy(head, shown.data)
