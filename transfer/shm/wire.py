"""What a receiver hands out, and what its address says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from transfer.errors import PeerMisbehaved
from transfer.layout import Endpoint, Natural, Positive
from transfer.session.wire import UNREADABLE

MAX_FILES = 60
"""A pool may lie in so many files; `session.greeting` bounds how many are sent."""

MAX_REGIONS = 4096
"""So many pieces a pool may have: each is a mapping, of which Linux gives a process 65,530."""

RECEIPT_BYTES = 1
SCRATCH_BYTES = 4 << 20

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Part of a file: which of those that came along, where in it, how much."""

    file: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILES + 2)]
    offset: Natural
    size: Positive


class Invitation(msgspec.Struct, frozen=True, array_like=True):
    """The pool's regions in their order, room to measure in, and where to leave a sign.

    The sender sets the byte of `receipt` to 1 when it is through with the session and will not
    write to the pool again; it counts where no message can be sent any more.
    """

    regions: Annotated[tuple[Piece, ...], msgspec.Meta(min_length=1, max_length=MAX_REGIONS)]
    scratch: Piece
    receipt: Piece


_invitation = msgspec.msgpack.Decoder(Invitation)


def invitation(blob: bytes) -> Invitation:
    """Decode what a receiver hands out.

    Raises:
        PeerMisbehaved: it makes no sense.
    """
    try:
        return _invitation.decode(blob)
    except UNREADABLE as error:
        raise PeerMisbehaved(f"not an invitation: {error}") from error


def this_host() -> str:
    """What tells this machine, since it was started, from every other."""
    return BOOT_ID.read_text().strip()


def address(path: Path) -> Endpoint:
    """Where a receiver that listens at `path` on this machine is reached."""
    return Endpoint("shm", f"{this_host()}:{path}")


def path_of(endpoint: Endpoint) -> str:
    """The opposite of `address`.

    Raises:
        ValueError: it is no address of this transport, or one on another machine.
    """
    host, colon, path = endpoint.address.partition(":")
    if endpoint.transport != "shm" or not colon or not path.startswith("/"):
        raise ValueError(f"endpoint: {endpoint.transport} {endpoint.address!r} is not host:path")
    if host != this_host():
        raise ValueError(f"it is on another host ({host}, not {this_host()})")
    return path
