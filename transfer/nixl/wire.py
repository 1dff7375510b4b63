"""What the two ends say beside the session, and what is in its greeting.

On a further connection of the session, the sender asks and the receiver answers in the same
order, each frame a big-endian 32-bit length and a MessagePack message:

    sender    Busy -> Where ->        Ingest ->           Ingest ->
    receiver                 There            Ingested             Ingested

`Where` must be answered before anything of a ticket is written; `Ingest` has what lies in a slot
of the arena copied to its places in the pool.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.errors import PeerMisbehaved
from transfer.layout import Endpoint, Landing, Natural
from transfer.session.wire import UNREADABLE

PREFIX = struct.Struct(">I")
SLOT_BYTES = 1 << 20
"""What is staged at a time; not less than a frame of `Conversion`."""
SLOTS = 4
"""Slots of each peer at either end: one is filled, one travels, one is copied to its places."""
WINDOW_BYTES = SLOTS * SLOT_BYTES
MAX_RUNS = 1 << 14
MAX_MESSAGE_BYTES = 1 << 20

Runs = NDArray[np.int64]
Short = Annotated[str, msgspec.Meta(max_length=64)]
Blob = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
Table = Annotated[bytes, msgspec.Meta(max_length=8 * MAX_RUNS)]


class Process(msgspec.Struct, frozen=True, array_like=True):
    """Which process a sender is: `space` is equal where both see the same process numbers."""

    space: Short
    pid: Natural
    started: Natural

    @classmethod
    def here(cls) -> Process:
        """This process."""
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return cls(
            f"{boot} {os.stat('/proc/self/ns/pid').st_ino}", os.getpid(), started(os.getpid())
        )


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """In the sender's hello. `carrier` is the same for all its sessions with this receiver.

    `settled` says that nothing of the earlier ones can land any more.
    """

    carrier: Short
    process: Process
    settled: bool


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """In the receiver's welcome: its agent, and `SLOTS` slots of its arena for this peer."""

    metadata: Blob
    arena: Natural


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Anything that travels beside the session."""


class Busy(Message, frozen=True):
    """Whether the sender writes to its slots outside of handoffs, as it does before it says so."""

    writing: bool


class Where(Message, frozen=True):
    """Where does the landing of a ticket lie? `direct` is whether the sender will write there."""

    ticket: Natural
    direct: bool


class Ingest(Message, frozen=True):
    """Copy the runs in a slot, one after the other, to where they belong."""

    ticket: Natural
    slot: Natural
    offsets: Table
    lengths: Table


class There(Message, frozen=True):
    """The `mark` of the landing that the receiver knows; empty if it is gone.

    For a direct writer: the offsets at which the pool's regions begin, their addresses `bases`, and
    the `metadata` that the sender lacks to write there.
    """

    mark: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    starts: tuple[Natural, ...] = ()
    bases: tuple[Natural, ...] = ()
    metadata: Blob = b""


class Ingested(Message, frozen=True):
    """The slot is free."""

    slot: Natural


ToReceiver = Busy | Where | Ingest
ToSender = There | Ingested
Kind = TypeVar("Kind")

_terms = msgspec.msgpack.Decoder(Terms)
_greeting = msgspec.msgpack.Decoder(Greeting)
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_to_sender: msgspec.msgpack.Decoder[ToSender] = msgspec.msgpack.Decoder(ToSender)


def say(connection: socket.socket, message: Message) -> None:
    """Send one message.

    Raises:
        OSError: the connection broke.
    """
    body = msgspec.msgpack.encode(message)
    connection.sendall(PREFIX.pack(len(body)) + body)


def hear_sender(connection: socket.socket) -> ToReceiver | None:
    """What the sender says next; None at the end.

    Raises:
        PeerMisbehaved: it is not one of its messages.
        OSError: the connection broke, or stood still within a message.
    """
    head = _exactly(connection, PREFIX.size)
    return None if head is None else decode(_to_receiver, _body(connection, head))


def hear_receiver(connection: socket.socket) -> ToSender:
    """What the receiver says next; raises as `hear_sender`, and OSError at the end."""
    head = _exactly(connection, PREFIX.size)
    if head is None:
        raise ConnectionResetError("the connection was closed")
    message = decode(_to_sender, _body(connection, head))
    if isinstance(message, There):
        _check_regions(message)
    return message


def _check_regions(there: There) -> None:
    """Every offset is in one of the regions, if there are any, and each of those somewhere."""
    starts = there.starts
    if len(there.bases) != len(starts):
        raise PeerMisbehaved(f"{len(starts)} regions at {len(there.bases)} addresses")
    if starts and (starts[0] or any(it >= other for it, other in pairwise(starts))):
        raise PeerMisbehaved("regions that do not lie one after the other")


def decode(decoder: msgspec.msgpack.Decoder[Kind], body: bytes) -> Kind:
    """Decode one message.

    Raises:
        PeerMisbehaved: it is not one that `decoder` knows.
    """
    try:
        return decoder.decode(body)
    except UNREADABLE as error:
        raise PeerMisbehaved(f"not a message: {error}") from error


def terms(blob: bytes) -> Terms:
    """Decode what a receiver says in its welcome; raises as `decode`."""
    return decode(_terms, blob)


def greeting(blob: bytes) -> Greeting:
    """Decode what a sender says in its hello; raises as `decode`."""
    return decode(_greeting, blob)


def runs_of(message: Ingest) -> tuple[Runs, Runs]:
    """The runs that an `Ingest` names, as offsets into the pool and lengths.

    Raises:
        PeerMisbehaved: they contradict each other, or do not fit into a slot.
    """
    count, rest = divmod(len(message.offsets), 8)
    if not count or rest or len(message.lengths) != len(message.offsets):
        raise PeerMisbehaved(f"{len(message.offsets)} bytes of offsets")
    offsets = np.frombuffer(message.offsets, dtype="<i8").astype(np.int64)
    lengths = np.frombuffer(message.lengths, dtype="<i8").astype(np.int64)
    if lengths.min() < 1 or lengths.max() > SLOT_BYTES or lengths.sum() > SLOT_BYTES:
        raise PeerMisbehaved(f"runs of {lengths.sum()} bytes in a slot")
    return offsets, lengths


def mark_of(landing: Landing) -> bytes:
    """What both ends must agree on before one writes into the other's memory."""
    said = (landing.id, landing.epoch, landing.place)
    return hashlib.sha256(msgspec.msgpack.encode(said)).digest()


def started(pid: int) -> int:
    """When a process was started, in ticks since the machine was; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def address(host: str, port: int) -> Endpoint:
    """Where a receiver can be reached."""
    return Endpoint("nixl", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            if data:
                raise ConnectionResetError("the connection was closed within a message")
            return None
        data += more
    return bytes(data)


def _body(connection: socket.socket, head: bytes) -> bytes:
    [size] = PREFIX.unpack(head)
    if not 0 < size <= MAX_MESSAGE_BYTES:
        raise PeerMisbehaved(f"a message of {size} bytes")
    body = _exactly(connection, size)
    if body is None:
        raise ConnectionResetError("the connection was closed within a message")
    return body


def host_and_port(endpoint: Endpoint) -> tuple[str, int]:
    """The opposite of `address`.

    Raises:
        ValueError: it is not an address of this transport.
    """
    host, colon, port = endpoint.address.rpartition(":")
    if endpoint.transport != "nixl" or not colon or not port.isdecimal():
        raise ValueError(f"endpoint: {endpoint.transport} {endpoint.address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
