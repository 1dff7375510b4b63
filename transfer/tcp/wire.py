"""What the two ends of a connection say to each other, and how long it may be.

A frame is two big-endian 32-bit lengths, then a MessagePack message of the first length, then a
payload of the second. Only `Write` has a payload: the bytes of its runs, one after the other.
The sender speaks first (`Hello`), and nothing else is heard before it was welcomed. A `ticket`
is a number by which the sender names one handoff on this connection; `Open` shows the right to
its landing once, and what follows under that ticket can only come from whoever showed it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.errors import PeerMisbehaved
from transfer.layout import Endpoint, Epoch, Natural

VERSION = 1
PREFIX = struct.Struct(">II")

MAX_NOTE_BYTES = 4 << 20
MAX_MESSAGE_BYTES = MAX_NOTE_BYTES + (64 << 10)
MAX_STRANGER_BYTES = 4 << 10
MAX_PAYLOAD_BYTES = 2 << 20
MAX_TICKETS = 4096

LandingId = Annotated[str, msgspec.Meta(max_length=64)]
MAX_DETAIL = 4096
Detail = Annotated[str, msgspec.Meta(max_length=MAX_DETAIL)]
Outcome = Literal["landed", "gone", "mismatch", "aborted"]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Anything that travels in a frame."""


class Hello(Message, frozen=True):
    """First from the sender: which protocol, the workers' shared secret, the layout it expects."""

    version: int
    secret: Annotated[bytes, msgspec.Meta(max_length=1024)]
    fingerprint: Annotated[str, msgspec.Meta(max_length=64)]


class Open(Message, frozen=True):
    """Begin to write into a landing, under `ticket`."""

    ticket: Natural
    landing: LandingId
    epoch: Epoch
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]


class Write(Message, frozen=True):
    """Runs of the pool whose bytes follow: offsets as little-endian u64, lengths as u32."""

    ticket: Natural
    offsets: bytes
    lengths: bytes


class Commit(Message, frozen=True):
    """All has been written: compare this digest with the pool and hand the prefix over."""

    ticket: Natural
    digest: Annotated[bytes, msgspec.Meta(max_length=64)]
    note: Annotated[bytes, msgspec.Meta(max_length=MAX_NOTE_BYTES)]


class Abort(Message, frozen=True):
    """Nothing more comes under this ticket."""

    ticket: Natural


class Welcome(Message, frozen=True):
    """Answer to `Hello`."""

    version: int


class Denied(Message, frozen=True):
    """Instead of `Welcome`: why not. The receiver closes the connection."""

    reason: Detail


class Answer(Message, frozen=True):
    """How a handoff ended: after `Commit` or `Abort`, or unasked when its landing is gone."""

    ticket: Natural
    outcome: Outcome
    detail: Detail = ""
    verify_seconds: float = 0.0
    size: int = 0
    answer: Annotated[bytes, msgspec.Meta(max_length=MAX_NOTE_BYTES)] = b""


ToReceiver = Hello | Open | Write | Commit | Abort
ToSender = Welcome | Denied | Answer

_encoder = msgspec.msgpack.Encoder()
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_to_sender: msgspec.msgpack.Decoder[ToSender] = msgspec.msgpack.Decoder(ToSender)


def frame(message: Message, payload_bytes: int = 0) -> bytes:
    """The beginning of a frame, up to its payload."""
    body = _encoder.encode(message)
    return PREFIX.pack(len(body), payload_bytes) + body


def to_receiver(body: bytes | bytearray | memoryview) -> ToReceiver:
    """Decode what a sender said.

    Raises:
        PeerMisbehaved: it is not one of the messages.
    """
    try:
        return _to_receiver.decode(body)
    except msgspec.MsgspecError as error:
        raise PeerMisbehaved(f"not a message: {error}") from error


def to_sender(body: bytes | bytearray | memoryview) -> ToSender:
    """Decode what a receiver said.

    Raises:
        PeerMisbehaved: it is not one of the messages.
    """
    try:
        return _to_sender.decode(body)
    except msgspec.MsgspecError as error:
        raise PeerMisbehaved(f"not a message: {error}") from error


def write_message(ticket: int, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Write:
    """Name runs of the pool."""
    return Write(ticket, offsets.astype("<u8").tobytes(), lengths.astype("<u4").tobytes())


def runs_of(write: Write, payload_bytes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The runs that a `Write` names, as offsets and lengths.

    Raises:
        PeerMisbehaved: they contradict each other or the payload.
    """
    count, rest = divmod(len(write.offsets), 8)
    if not count or rest or len(write.lengths) != 4 * count:
        raise PeerMisbehaved(
            f"{len(write.offsets)} bytes of offsets with {len(write.lengths)} of lengths"
        )
    offsets = np.frombuffer(write.offsets, dtype="<u8").astype(np.int64)
    lengths = np.frombuffer(write.lengths, dtype="<u4").astype(np.int64)
    if int(lengths.sum()) != payload_bytes:
        raise PeerMisbehaved(f"runs of {lengths.sum()} bytes with {payload_bytes} of payload")
    return offsets, lengths


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


def twin(transport: asyncio.BaseTransport) -> socket.socket:
    """A second socket object for the connection of `transport`; to be closed by the caller."""
    return socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))


def notice_death(sock: socket.socket, seconds: float) -> None:
    """Have the kernel close the connection when the peer's machine is silent for so long."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(seconds / 2))),
        ("TCP_KEEPINTVL", max(1, round(seconds / 6))),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
