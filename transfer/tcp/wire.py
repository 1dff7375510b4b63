"""What travels on a data connection, one frame after the other, all little-endian.

    head       ticket u64, number of runs u32, bytes of payload u32,
               layer, layers, start, end u32 each
    offsets    one i64 for each run, flat byte offsets into the target pool
    lengths    one i64 for each run
    payload    the bytes of the runs, one after the other

Without runs, a frame is the part of the prefix that its head names (see `KVSlice`), in the order
of `Conversion.fill`: the receiver knows by itself where those bytes belong. A frame with runs
names no part; its bytes may be anything.

A frame under the ticket `NOBODY` is read, answered with a single byte, and forgotten. It is for
measurements. A commit names, as its proof, how many bytes of payload were sent under its ticket.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfer.contract import KVSlice
from transfer.errors import PeerMisbehaved
from transfer.layout import Endpoint

HEAD = struct.Struct("<QIIIIII")
PROOF = struct.Struct("<Q")
RUN_BYTES = 16

NOBODY = (1 << 64) - 1
MAX_RUNS = 1 << 16
MAX_PAYLOAD_BYTES = 4 << 20
"""The most that a frame carries, unless it is a single token of a single layer."""

BUFFER_BYTES = 4 << 20


class Head(NamedTuple):
    """How a frame begins: either it has runs, or it is a part."""

    ticket: int
    runs: int
    payload_bytes: int
    part: KVSlice | None


def head(
    ticket: int, offsets: NDArray[np.int64], lengths: NDArray[np.int64], payload_bytes: int
) -> bytes:
    """A frame with runs, up to its payload."""
    runs = offsets.astype("<i8").tobytes() + lengths.astype("<i8").tobytes()
    return HEAD.pack(ticket, len(offsets), payload_bytes, 0, 0, 0, 0) + runs


def head_of_part(ticket: int, part: KVSlice, payload_bytes: int) -> bytes:
    """A frame that is a part, up to its payload."""
    return HEAD.pack(ticket, 0, payload_bytes, part.layer, part.layers, part.start, part.end)


def read_head(data: bytes | bytearray | memoryview) -> Head:
    """The beginning of a frame.

    Raises:
        PeerMisbehaved: it is out of bounds.
    """
    ticket, runs, payload_bytes, layer, layers, start, end = HEAD.unpack(data)
    if runs:
        fits, part = runs <= MAX_RUNS and payload_bytes <= MAX_PAYLOAD_BYTES, None
    else:
        fits, part = layers > 0 and ticket != NOBODY, KVSlice(layer, start, end, layers)
    if not fits or not payload_bytes:
        raise PeerMisbehaved(f"a frame of {runs} runs, {layers} layers and {payload_bytes} bytes")
    return Head(ticket, runs, payload_bytes, part)


def runs_of(table: memoryview, payload_bytes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and lengths out of the bytes between head and payload.

    Raises:
        PeerMisbehaved: the lengths contradict the payload.
    """
    offsets, lengths = np.frombuffer(table, dtype="<i8").astype(np.int64).reshape(2, -1)
    # Each bounded first: a sum of lies could wrap around to the truth.
    inside = lengths.min() > 0 and lengths.max() <= payload_bytes
    if not inside or int(lengths.sum()) != payload_bytes:
        raise PeerMisbehaved(f"runs that do not make up {payload_bytes} bytes of payload")
    return offsets, lengths


def proof_of(data: bytes) -> int:
    """How many bytes a commit says were sent.

    Raises:
        PeerMisbehaved: it does not say.
    """
    if len(data) != PROOF.size:
        raise PeerMisbehaved(f"a proof of {len(data)} bytes")
    [sent] = PROOF.unpack(data)
    return int(sent)


def enlarge(connection: socket.socket) -> None:
    """Ask for large buffers; before it is connected, or accepted."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def address(host: str, port: int) -> Endpoint:
    """Where a TCP receiver can be reached."""
    return Endpoint("tcp", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def host_and_port(endpoint: Endpoint) -> tuple[str, int]:
    """The opposite of `address`.

    Raises:
        ValueError: it is not a TCP address.
    """
    host, colon, port = endpoint.address.rpartition(":")
    if endpoint.transport != "tcp" or not colon or not port.isdecimal():
        raise ValueError(f"endpoint: {endpoint.transport} {endpoint.address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def notice_death(connection: socket.socket, seconds: float) -> None:
    """Have the kernel close the connection when the peer's machine is silent for so long."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(seconds / 2))),
        ("TCP_KEEPINTVL", max(1, round(seconds / 6))),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
