"""Push slices over TCP: converted and sent, frame by frame, by the session's moving thread."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from typing import Any

import numpy as np

from transfer.contract import KVSlice
from transfer.convert import Conversion, Frame, Tamper
from transfer.layout import Endpoint, Landing
from transfer.session import Met, Move, Outgoing, SessionSender
from transfer.tcp import wire

PROBE_FRAMES = 4


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
        connection = socket.create_connection(wire.host_and_port(endpoint), seconds)
        wire.notice_death(connection, self._stall_seconds)
        return connection

    def hello(self, endpoint: Endpoint) -> bytes:
        """As `Carrier.hello`: nothing to say."""
        return b""

    def meet(self, met: Met) -> TcpMover:
        """As `Carrier.meet`: opens the data connection."""
        connection = met.join()
        connection.settimeout(self._stall_seconds)
        return TcpMover(connection)

    def close(self) -> None:
        """As `Carrier.close`."""


class TcpMover:
    """The data connection to one peer."""

    waits_for_grant = False  # the receiver checks each frame

    def __init__(self, connection: socket.socket) -> None:
        """Own `connection` from now on."""
        self._connection = connection

    def begin(self, outgoing: Outgoing) -> Move:
        """As `Mover.begin`."""
        return _TcpMove(self._connection, outgoing)

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

    def __init__(self, connection: socket.socket, outgoing: Outgoing) -> None:
        self._connection = connection
        self._ticket = outgoing.ticket
        self._landing: Landing = outgoing.landing
        self._over = outgoing.over
        self._digest = outgoing.digest
        self._tamper: Tamper | None = outgoing.tamper
        self._conversion = Conversion(outgoing.plan, outgoing.source, outgoing.landing)
        self._sent = 0

    def write(self, part: KVSlice) -> None:
        """As `Move.write`."""
        for frame in self._conversion.frames(part):
            if self._over():
                return
            if self._tamper is None:
                self._send(frame)
            elif (damaged := self._tamper(self._landing.id, frame)) is not None:
                self._send(damaged)
        if self._digest is not None:
            self._digest.add(part)

    def settle(self) -> bytes:
        """As `Move.settle`: how much was sent."""
        return wire.PROOF.pack(self._sent)

    def release(self) -> None:
        """As `Move.release`: the thread that calls it is the one that would write."""

    def _send(self, frame: Frame) -> None:
        size = len(frame.data)
        head = wire.head(self._ticket, frame.offsets, frame.lengths, size)
        self._sent += size
        buffers: list[Any] = [head, frame.data.data]
        sent = self._sendmsg(buffers)
        for buffer in buffers:
            if sent < len(buffer):
                self._connection.sendall(memoryview(buffer)[sent:])
                sent = 0
            else:
                sent -= len(buffer)

    def _sendmsg(self, buffers: list[Any]) -> int:
        """Begin with as much as leaves in one call; TLS has no such call."""
        if isinstance(self._connection, ssl.SSLSocket):
            return 0
        return self._connection.sendmsg(buffers)
