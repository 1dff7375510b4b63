"""What the worker and the library's ranks say to each other over a Unix socket.

Frames are a length and a MessagePack message. Ranks speak through a `Line`, whose threads block
instead of theirs. Both ends are of one user, which the socket's credentials prove.
"""

from __future__ import annotations

import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Annotated

import msgspec

from transfer.shm.process import require_own

MAX_FRAME_BYTES = 4 << 20
CONNECT_SECONDS = 10.0
LENGTH = struct.Struct(">I")

VARIABLE = "TLLM_BATON_EXPORT"
"""Where ranks find the socket. The library forwards what begins with TLLM to its processes."""

Blocks = Annotated[tuple[int, ...], msgspec.Meta(max_length=1 << 20)]
Reason = Annotated[str, msgspec.Meta(max_length=4096)]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Something said. `request` is the executor's id of a request."""


# ---- by a rank


class Geometry(Message, frozen=True):
    """The registered tensor of `rank`: its shape [blocks, layers, planes, row] and its dtype."""

    rank: int
    world: int
    shape: tuple[int, int, int, int]
    dtype: str
    block_tokens: int
    attention: str


class Exported(Message, frozen=True):
    """The KV of positions before `end` is in the rank's arena."""

    request: int
    end: int


class Voided(Message, frozen=True):
    """A request's KV was lost; no more of it is exported. Its blocks are not kept for that."""

    request: int
    reason: Reason


class Closed(Message, frozen=True):
    """The answer to `Close`: nothing is written to the arena for the request any more."""

    request: int


class Released(Message, frozen=True):
    """The rank has told the executor that it needs the request's blocks no longer."""

    request: int


# ---- by the scheduler, which only rank 0 has


class Scheduling(Message, frozen=True):
    """The first word of a scheduler."""


class Seated(Message, frozen=True):
    """A request has its blocks. `digest` is that of its prompt; `reused` tokens are there."""

    request: int
    digest: bytes
    blocks: int
    reused: int


class Finished(Message, frozen=True):
    """The library has called `request_finished`: what was computed was the request's to its end.

    With `pinned` its blocks stay until all ranks have released them.
    """

    request: int
    blocks: int
    pinned: bool


# ---- to a rank or the scheduler


class Arena(Message, frozen=True):
    """The rank's arena, `blocks` of the engine's own size; its file comes along.

    A head's numbers of one token take `head_bytes`.
    """

    blocks: int
    head_bytes: int
    offset: int


class Open(Message, frozen=True):
    """Export the first `tokens` of a request into these blocks of the arena, in their order.

    A rank that is given no blocks exports nothing. The engine's blocks stay pinned for
    `lease_seconds` at most, from when the request has finished.
    """

    request: int
    tokens: int
    blocks: Blocks
    lease_seconds: float


class Close(Message, frozen=True):
    """Export no more of a request."""

    request: int


FromRank = Geometry | Exported | Voided | Closed | Released | Scheduling | Seated | Finished
ToRank = Arena | Open | Close

encode = msgspec.msgpack.Encoder().encode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode


class Step(msgspec.Struct, frozen=True, array_like=True):
    """After a pass, the KV of positions `start` to `end` of a request is final.

    `blocks` are the engine's that hold them, from that of `start` on.
    """

    request: int
    start: int
    end: int
    blocks: Blocks


class Pass(msgspec.Struct, frozen=True, array_like=True):
    """What the scheduler tells all ranks before a pass; `number` grows by one each time.

    `taken` are the engine's blocks that were given to any request for this pass to write to.
    """

    number: int
    steps: tuple[Step, ...]
    taken: Blocks = ()


decode_pass = msgspec.msgpack.Decoder(Pass).decode


def frame(message: Message) -> bytes:
    """`message` as it travels.

    Raises:
        ValueError: it is longer than the other end takes.
    """
    body = encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes")
    return LENGTH.pack(len(body)) + body


class Line:
    """A rank's end: `send` returns at once; `heard` is called from a thread of its own.

    `heard` gets a message and the files that came with it; None when the connection has ended.
    """

    def __init__(self, first: Message, heard: Callable[[ToRank | None, list[int]], None]) -> None:
        """Connect to where the environment says, and say the first word.

        Raises:
            KeyError: the environment does not say where.
            OSError: nobody of our own user listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(CONNECT_SECONDS)
            self._socket.connect(os.environ[VARIABLE])
            self.peer = require_own(self._socket)
            self._socket.sendall(frame(first))
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise
        self._heard = heard
        self._words: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        for target in (self._write, self._read):
            threading.Thread(target=target, daemon=True, name="baton-export-line").start()

    def send(self, message: Message) -> None:
        """Queue a message; dropped in silence once the connection has ended."""
        self._words.put(message)

    def _write(self) -> None:
        while (message := self._words.get()) is not None:
            try:
                self._socket.sendall(frame(message))
            except OSError:
                return

    def _read(self) -> None:
        try:
            while True:
                self._heard(*self._next())
        except (OSError, EOFError, msgspec.DecodeError, UnicodeDecodeError, ValueError):
            self._heard(None, [])
        finally:
            self._words.put(None)
            self._socket.close()

    def _next(self) -> tuple[ToRank, list[int]]:
        fds: list[int] = []
        [size] = LENGTH.unpack(self._exactly(LENGTH.size, fds))
        if not 0 < size <= MAX_FRAME_BYTES:
            raise ValueError(f"a message of {size} bytes")
        return decode_to_rank(self._exactly(size, fds)), fds

    def _exactly(self, count: int, fds: list[int]) -> bytes:
        data = bytearray()
        while len(data) < count:
            more, some, _, _ = socket.recv_fds(self._socket, count - len(data), 1)
            fds += some
            if not more:
                raise EOFError
            data += more
        return bytes(data)
