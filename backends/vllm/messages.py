"""What the worker and its engine process say to each other, over a socket that both inherit.

Frames are a length in four bytes and MessagePack; nothing is pickled. The first message is `Setup`
from the worker, the first answer `Loaded` or `Unfit`; then jobs one way and events the other.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from backends.api import DecodeJob, Output, PrefillJob, Sampled
from backends.errors import BackendError
from backends.vllm.options import Options
from transfer.layout import KVLayout

MOST_FRAME_BYTES = 1 << 28
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18


class Setup(msgspec.Struct, tag=True, frozen=True):
    """What to load, and the arena: its descriptor in that process, and how it is cut.

    `bound`: the process is to be killed when the thread that started it ends.
    """

    options: Options
    layout: KVLayout
    arena_fd: int
    arena_bytes: int
    end_tokens: tuple[int, ...]
    bound: bool


class TakePrefill(msgspec.Struct, tag=True, frozen=True):
    """A prefix to compute."""

    job: PrefillJob


class TakeDecode(msgspec.Struct, tag=True, frozen=True):
    """A sequence to decode."""

    job: DecodeJob


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Do no more for a job."""

    job: str


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The engine is ready; `version` is vLLM's, `kernel` the name of its attention."""

    version: str
    kernel: str


class Unfit(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot be used with this model or these options."""

    reason: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """See `Events.ready`."""

    job: str
    start: int
    end: int
    layer: int | None


class Imported(msgspec.Struct, tag=True, frozen=True):
    """See `Events.imported`."""

    job: str


class Prefilled(msgspec.Struct, tag=True, frozen=True):
    """See `Events.prefilled`."""

    job: str
    output: Output
    cached: int


class Decoded(msgspec.Struct, tag=True, frozen=True):
    """See `Events.decoded`."""

    tokens: tuple[tuple[str, Sampled], ...]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """See `Events.failed`."""

    job: str
    detail: str


class Ended(msgspec.Struct, tag=True, frozen=True):
    """See `Events.ended`."""

    job: str


class Pinned(msgspec.Struct, tag=True, frozen=True):
    """How many of the engine's blocks a job holds now."""

    job: str
    blocks: int


ToEngine = Setup | TakePrefill | TakeDecode | Abort
FromEngine = Loaded | Unfit | Ready | Imported | Prefilled | Decoded | Failed | Ended | Pinned

_encode = msgspec.msgpack.Encoder().encode


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it is sent."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """Reads one kind of message from a socket."""

    def __init__(self, end: socket.socket, kind: object) -> None:
        self._end = end
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def read(self) -> list[Message]:
        """Wait for bytes; the messages that they complete.

        Raises:
            EOFError: the other end is gone.
            BackendError: it sent what is no message.
        """
        data = self._end.recv(_READ_BYTES)
        if not data:
            raise EOFError
        self._buffer += data
        return list(self._whole())

    def _whole(self) -> Iterator[Message]:
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MOST_FRAME_BYTES:
                raise BackendError(f"a frame of {length} bytes from the engine process")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            try:
                yield self._decoder.decode(self._buffer[_LENGTH.size : end])
            except msgspec.DecodeError as error:
                raise BackendError(f"an unreadable message: {error}") from error
            del self._buffer[:end]
