"""Hand out the pool's memory to senders on this machine, and know when they are through with it.

Nothing is received here: senders write by themselves, and say when they have. A withdrawn landing
is quiet when its sender has said so; where the connection is lost, when the sender has left its
sign in shared memory or its process has ended (`process.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from transfer.contract import Arrival, Buffer, Proof, nobody_minds
from transfer.errors import PeerMisbehaved
from transfer.layout import Endpoint, KVLayout, Landing
from transfer.pool import Pool
from transfer.session import Offer, SessionReceiver
from transfer.session.handoff import Handoff, Peer
from transfer.shared_memory import Segment, allocate, segment_of
from transfer.shm import wire
from transfer.shm.process import Process

LOOK_SECONDS = 0.02
"""How often a sender whose connection is lost is looked at, while it keeps blocks in quarantine."""


class ShmReceiver(SessionReceiver):
    """A `Receiver` of writes into `pool`, which must come from `shared_memory.allocate`.

    `socket_path` is where to listen, in a folder that only this user may enter; None makes one.
    Further arguments are those of `SessionReceiver`.
    """

    def __init__(
        self,
        layout: KVLayout,
        pool_blocks: int,
        pool: Buffer,
        *,
        socket_path: Path | None = None,
        secret: str = "",
        stall_seconds: float = 10.0,
        max_connections: int = 256,
        digest: bool = True,
    ) -> None:
        """Prepare; `start` begins to listen.

        Raises:
            ValueError: the pool is not one of `pool_blocks` blocks, or not in shared memory.
        """
        self._pool = Pool.of(layout, pool_blocks, pool)
        super().__init__(
            layout,
            ShmIntake(self._pool, socket_path),
            secret=secret,
            stall_seconds=stall_seconds,
            max_connections=max_connections,
            digest=digest,
        )

    def expect(
        self,
        landing: Landing,
        pool: Buffer,
        *,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
        claimed: Callable[[], None] = nobody_minds,
        proofs: Sequence[Proof] = (),
    ) -> None:
        """As `Receiver.expect`.

        Raises:
            ValueError: as in `SessionReceiver.expect`, or it is not the pool that is handed out.
        """
        mine = Pool.of(landing.layout, landing.pool_blocks, pool)
        if mine.bases.tolist() != self._pool.bases.tolist() or mine.nbytes != self._pool.nbytes:
            raise ValueError(f"landing {landing.id}: it is in another pool than is handed out")
        super().expect(
            landing,
            pool,
            touched=touched,
            arrived=arrived,
            failed=failed,
            claimed=claimed,
            proofs=proofs,
        )


class _Guest:
    """One sender that was handed the pool."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.receipt = allocate(wire.RECEIPT_BYTES)
        self.handoffs: list[Handoff] = []

    @property
    def through(self) -> bool:
        """Whether nothing of it can be written to the pool any more."""
        return bool(self.receipt[0]) or self.process.dead

    def dismiss(self) -> None:
        """It is through: its handoffs are quiet."""
        for handoff in self.handoffs:
            handoff.released()
        self.process.close()


class ShmIntake:
    """Listens on a Unix socket in a private folder and hands out `pool`."""

    def __init__(self, pool: Pool, socket_path: Path | None) -> None:
        """Prepare; nothing is listened on yet.

        Raises:
            ValueError: the pool is not in memory that can be shared, or in too many files.
        """
        if len(pool.regions) > wire.MAX_REGIONS:
            raise ValueError(f"pool: it has {len(pool.regions)} regions")
        found = [segment_of(region) for region in pool.regions]
        self._segments = [it for it in found if it is not None]
        if len(self._segments) < len(found):
            raise ValueError("pool: it was not made by `allocate` and cannot be shared")
        if len({it.fd for it in self._segments}) > wire.MAX_FILES:
            raise ValueError(f"pool: it lies in more than {wire.MAX_FILES} files")
        self._pool = pool  # as long as it is handed out
        self._scratch = allocate(wire.SCRATCH_BYTES)
        self._path = socket_path
        self._own_folder: Path | None = None
        self._guests: dict[Peer, _Guest] = {}
        self._leaving: dict[_Guest, asyncio.TimerHandle] = {}

    def listen(self) -> tuple[socket.socket, Endpoint]:
        """As `Intake.listen`."""
        if self._path is None:
            self._own_folder = Path(tempfile.mkdtemp(prefix="baton-shm-"))
            self._path = self._own_folder / "kv.sock"
        _prepare(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
        return listener, wire.address(self._path)

    def welcome(self, peer: Peer, hello: bytes) -> Offer:
        """As `Intake.welcome`: the files of the pool, of the scratch memory, of a receipt."""
        try:
            guest = _Guest(Process(peer.connection))
        except OSError as error:
            raise PeerMisbehaved(f"shared memory is not for it: {error}") from error
        self._guests[peer] = guest
        extra = [segment_of(self._scratch), segment_of(guest.receipt)]
        segments = [*self._segments, *(it for it in extra if it is not None)]
        fds = tuple(dict.fromkeys(it.fd for it in segments))
        *regions, scratch, receipt = (_piece(it, fds) for it in segments)
        told = wire.Invitation(tuple(regions), scratch, receipt)
        return Offer(msgspec.msgpack.encode(told), fds)

    def join(self, peer: Peer, connection: socket.socket) -> None:
        """As `Intake.join`.

        Raises:
            PeerMisbehaved: always; there is nothing to say on a second connection.
        """
        raise PeerMisbehaved("a second connection")

    def prepare(self, handoff: Handoff) -> None:
        """As `Intake.prepare`: there is nothing to do."""

    def complete(self, handoff: Handoff, proof: bytes, then: Callable[[], None]) -> None:
        """As `Intake.complete`: a sender commits after its last copy."""
        then()

    def stopped(self, handoff: Handoff) -> None:
        """As `Intake.stopped`: its sender may be in the middle of a copy."""

    def acknowledged(self, handoff: Handoff) -> None:
        """As `Intake.acknowledged`."""
        handoff.released()

    def parted(self, peer: Peer, handoffs: list[Handoff]) -> None:
        """As `Intake.parted`: watch the sender until it is through."""
        guest = self._guests.pop(peer)
        guest.handoffs = handoffs
        self._look(guest, peer.loop)

    async def close(self) -> None:
        """As `Intake.close`."""
        for guest, timer in self._leaving.items():
            timer.cancel()
            guest.process.close()
        self._leaving.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._own_folder is not None:
            self._own_folder.rmdir()
            self._own_folder = None

    def _look(self, guest: _Guest, loop: asyncio.AbstractEventLoop) -> None:
        self._leaving.pop(guest, None)
        if guest.through or not guest.handoffs:
            guest.dismiss()
        else:
            self._leaving[guest] = loop.call_later(LOOK_SECONDS, self._look, guest, loop)


def _piece(segment: Segment, fds: tuple[int, ...]) -> wire.Piece:
    return wire.Piece(fds.index(segment.fd), segment.offset, segment.size)


def _prepare(path: Path) -> None:
    """Make way for a socket: its folder must be ours alone, and nobody may listen there.

    Raises:
        OSError: others may enter the folder, or somebody listens.
    """
    folder = path.parent.stat()
    if folder.st_uid != os.geteuid() or folder.st_mode & 0o077:
        raise PermissionError(f"{path.parent} is not this user's alone; its mode must be 0700")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
        contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
    ):
        probe.connect(str(path))
        raise OSError(f"somebody else listens on {path}")
    path.unlink(missing_ok=True)  # left from a process that died
