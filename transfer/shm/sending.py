"""Write into another process's pool: its memory is mapped when they meet, then copied into."""

from __future__ import annotations

import os
import socket
import time

import numpy as np

from transfer.contract import KVSlice
from transfer.convert import Conversion, Frame, Tamper
from transfer.errors import PeerMisbehaved
from transfer.kernels import copy_runs
from transfer.layout import Endpoint
from transfer.pool import Pool
from transfer.session import Met, Move, Outgoing, SessionSender
from transfer.shared_memory import Bytes, Segment, attach
from transfer.shm import wire
from transfer.shm.process import require_own

PROBES = 4

PIECE_BYTES = 4 << 20
"""About how much is written before it is asked whether anybody still wants it."""


class ShmSender(SessionSender):
    """A `Sender` to processes on this machine; the arguments are those of `SessionSender`."""

    def __init__(
        self,
        *,
        secret: str = "",
        allow_unlike_weights: bool = False,
        backlog_bytes: int = 64 << 20,
        connect_seconds: float = 5.0,
        stall_seconds: float = 10.0,
    ) -> None:
        """Prepare; nothing is connected yet."""
        super().__init__(
            ShmCarrier(),
            secret=secret,
            allow_unlike_weights=allow_unlike_weights,
            backlog_bytes=backlog_bytes,
            connect_seconds=connect_seconds,
            stall_seconds=stall_seconds,
        )


class ShmCarrier:
    """Reaches receivers on this machine that run as the same user."""

    transport = "shm"

    def dial(self, endpoint: Endpoint, seconds: float) -> socket.socket:
        """As `Carrier.dial`."""
        path = wire.path_of(endpoint)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds)
            connection.connect(path)
            require_own(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def hello(self, endpoint: Endpoint) -> bytes:
        """As `Carrier.hello`: nothing to say."""
        return b""

    def meet(self, met: Met) -> ShmMover:
        """As `Carrier.meet`: maps what was handed out, every page of it."""
        try:
            told = wire.invitation(met.blob)
            regions = [_map(piece, met.fds) for piece in told.regions]
            return ShmMover(regions, _map(told.scratch, met.fds), _map(told.receipt, met.fds))
        except ValueError as error:
            raise PeerMisbehaved(str(error)) from error
        finally:
            for fd in met.fds:
                os.close(fd)

    def close(self) -> None:
        """As `Carrier.close`."""


def _map(piece: wire.Piece, fds: tuple[int, ...]) -> Bytes:
    if piece.file >= len(fds):
        raise PeerMisbehaved(f"file {piece.file} of {len(fds)} is handed out")
    return attach(Segment(fds[piece.file], piece.offset, piece.size))


class ShmMover:
    """The memory of one peer."""

    waits_for_grant = True

    def __init__(self, regions: list[Bytes], scratch: Bytes, receipt: Bytes) -> None:
        """Write to `regions` from now on."""
        self._regions = regions
        self._scratch = scratch
        self._receipt = receipt

    def begin(self, outgoing: Outgoing) -> Move:
        """As `Mover.begin`."""
        landing = outgoing.landing
        try:
            pool = Pool.of(landing.layout, landing.pool_blocks, self._regions)
        except ValueError as error:
            raise PeerMisbehaved(f"landing {landing.id}: {error}") from error
        return _ShmMove(pool, outgoing)

    def probe(self) -> float:
        """As `Mover.probe`: the best of a few copies into the peer's scratch memory."""
        ours = np.ones(len(self._scratch), dtype=np.uint8)
        best = float("inf")
        for _ in range(PROBES):
            begun = time.perf_counter()
            self._scratch[:] = ours
            best = min(best, time.perf_counter() - begun)
        return len(ours) / best

    def cut(self) -> None:
        """As `Mover.cut`: a copy ends by itself."""

    def close(self) -> None:
        """As `Mover.close`: leaves the sign that nothing more will be written."""
        self._receipt[0] = 1
        self._regions = []


class _ShmMove:
    """One handoff, copied by the session's moving thread."""

    def __init__(self, pool: Pool, outgoing: Outgoing) -> None:
        self._pool = pool
        self._outgoing = outgoing
        self._conversion = Conversion(outgoing.plan, outgoing.source, outgoing.landing)

    def write(self, part: KVSlice) -> None:
        """As `Move.write`; all has landed when it returns."""
        for piece in self._conversion.windows(part, PIECE_BYTES):
            if self._outgoing.over():
                return
            if self._outgoing.tamper is None:
                self._conversion.write(piece, self._pool, self._outgoing.digest)
            else:
                self._write_damaged(piece, self._outgoing.tamper)

    def _write_damaged(self, piece: KVSlice, tamper: Tamper) -> None:
        for frame in self._conversion.frames(piece):
            damaged = tamper(self._outgoing.landing.id, frame)
            if damaged is not None:
                put(damaged, self._pool)
        if self._outgoing.digest is not None:
            self._outgoing.digest.add(piece)

    def settle(self) -> bytes:
        """As `Move.settle`: a write that has returned has landed."""
        return b""

    def release(self) -> None:
        """As `Move.release`: the thread that calls it is the one that would write."""


def put(frame: Frame, pool: Pool) -> None:
    """Write the bytes of a frame to where they belong in `pool`.

    Raises:
        ValueError: a run is not within the pool, or they are not as long as the data.
    """
    offsets, lengths = frame.offsets, frame.lengths
    if lengths.min() < 0 or int(lengths.sum()) != len(frame.data):
        raise ValueError(f"runs of {lengths.sum()} bytes for {len(frame.data)}")
    if offsets.min() < 0 or (offsets + lengths).max() > pool.nbytes:
        raise ValueError(f"a run reaches beyond the {pool.nbytes} bytes of the pool")
    sources = frame.data.ctypes.data + np.cumsum(lengths) - lengths
    copy_runs(sources, pool.addresses(offsets), lengths)
