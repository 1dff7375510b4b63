"""Push slices over TCP: converted and sent, frame by frame, by the session's moving thread."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

import numpy as np

from transfer.contract import KVSlice
from transfer.convert import Conversion, Tamper
from transfer.layout import Endpoint, Landing
from transfer.session import Met, Move, Outgoing, SessionSender
from transfer.tcp import wire
from transfer.tcp.vectored import I64, Places

PROBE_FRAMES = 4

FRAME_BYTES = 256 << 10
"""A frame is sent once it has so many bytes: the cost of a frame is small beside that."""

WINDOW_BYTES = 1 << 20
"""About how much is sent before it is read again for the digest, while it is in the cache."""


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
    """The data connection to one peer. Over TLS, all bytes are `staged`."""

    waits_for_grant = False  # the receiver checks each frame

    def __init__(self, connection: socket.socket, stall_seconds: float) -> None:
        """Own `connection`, which blocks, from now on."""
        self.staged = isinstance(connection, ssl.SSLSocket)
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
            wire.MAX_PAYLOAD_BYTES,
        )
        if self.staged:
            for view in places.views():
                self._connection.sendall(view)
            return
        while places.left:
            try:
                places.send(self._connection)
            except BlockingIOError:
                if not self._poll.poll(self._stall_seconds * 1000):
                    raise TimeoutError(f"nothing was taken for {self._stall_seconds} s") from None

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
    """One handoff as frames. What is too little for a frame waits for more, or for `flush`."""

    def __init__(self, mover: TcpMover, outgoing: Outgoing) -> None:
        self._mover = mover
        self._ticket = outgoing.ticket
        self._landing: Landing = outgoing.landing
        self._over = outgoing.over
        self._digest = outgoing.digest
        self._tamper: Tamper | None = outgoing.tamper
        self._conversion = Conversion(outgoing.plan, outgoing.source, outgoing.landing)
        self._window = max(1, WINDOW_BYTES // outgoing.plan.token_bytes)
        self._verbatim = self._conversion.verbatim and self._tamper is None and not mover.staged
        self._staging = np.empty(0 if self._verbatim else FRAME_BYTES, np.uint8)
        self._staged = 0
        self._held: list[tuple[I64, I64, I64]] = []
        self._held_bytes = 0
        self._sent = 0

    def write(self, part: KVSlice) -> None:
        """As `Move.write`."""
        step = self._window if self._digest is not None else part.end - part.start
        for start in range(part.start, part.end, step):
            if self._over():
                return
            window = KVSlice(part.layer, start, min(part.end, start + step))
            if self._verbatim:
                self._hold(*self._conversion.moves(window))
            else:
                self._stage(window)
            if self._digest is not None:
                self._digest.add(window)

    def flush(self) -> None:
        """As `Move.flush`."""
        if self._held and not self._over():
            self._send()

    def settle(self) -> bytes:
        """As `Move.settle`: how much was sent."""
        self.flush()
        return wire.PROOF.pack(self._sent)

    def release(self) -> None:
        """As `Move.release`: the thread that calls it is the one that would write."""

    def _hold(self, addresses: I64, offsets: I64, lengths: I64) -> None:
        """Add runs to the frame that is being filled, and send what fills one."""
        for piece in wire.pieces(addresses, offsets, lengths, FRAME_BYTES):
            size = int(piece[2].sum())
            if self._held_bytes + size > wire.MAX_PAYLOAD_BYTES:
                self._send()
            self._held.append(piece)
            self._held_bytes += size
            if self._held_bytes >= FRAME_BYTES:
                self._send()

    def _stage(self, window: KVSlice) -> None:
        """Convert; what does not fill a frame is copied to where it can wait."""
        for frame in self._conversion.frames(window):
            shown = self._tamper(self._landing.id, frame) if self._tamper is not None else frame
            if self._over() or shown is None:
                continue
            size = len(shown.data)
            if self._held_bytes + size > FRAME_BYTES:
                self.flush()
            begin = np.cumsum(shown.lengths) - shown.lengths
            if self._held_bytes + size > FRAME_BYTES // 2:
                self._hold(begin + shown.data.ctypes.data, shown.offsets, shown.lengths)
                self.flush()  # before the next frame takes its place
                continue
            room = self._staging[self._held_bytes : self._held_bytes + size]
            room[:] = shown.data
            self._hold(begin + room.ctypes.data, shown.offsets, shown.lengths)

    def _send(self) -> None:
        """Send what is held as one frame."""
        addresses, offsets, lengths = (np.concatenate(it) for it in zip(*self._held, strict=True))
        size, self._held_bytes = self._held_bytes, 0
        self._held.clear()
        self._sent += size
        self._mover.send(wire.head(self._ticket, offsets, lengths, size), addresses, lengths)
