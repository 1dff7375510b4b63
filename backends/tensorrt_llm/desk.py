"""The worker's end of the socket that the library's ranks connect to.

Runs on the plug-in's own event loop. Who connects must be of our own user; the first word says
whether it is a rank or rank 0's scheduler. A connection that ends is told once.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from backends.errors import BackendMisconfigured
from backends.tensorrt_llm.messages import (
    CONNECT_SECONDS,
    LENGTH,
    MAX_FRAME_BYTES,
    Arena,
    FromRank,
    Geometry,
    Message,
    Scheduling,
    decode_from_rank,
    frame,
)
from transfer.shared_memory import Bytes, segment_of
from transfer.shm.process import require_own

SCHEDULER = -1
"""The scheduler's place among the ranks."""


class Connection:
    """One end of one rank's connection."""

    def __init__(self, own: socket.socket) -> None:
        own.setblocking(False)
        self.socket = own
        self.words: asyncio.Queue[bytes] = asyncio.Queue()

    async def next(self) -> FromRank:
        """The next message.

        Raises:
            EOFError: the other end is gone.
            ValueError: it speaks another language.
            OSError: the connection broke.
        """
        [size] = LENGTH.unpack(await self._exactly(LENGTH.size))
        if not 0 < size <= MAX_FRAME_BYTES:
            raise ValueError(f"a message of {size} bytes")
        message: FromRank = decode_from_rank(await self._exactly(size))
        return message

    async def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = await asyncio.get_running_loop().sock_recv(self.socket, count - len(data))
            if not more:
                raise EOFError("the other end is gone")
            data += more
        return bytes(data)

    async def write(self) -> None:
        """Send what is queued until cancelled, or until the connection breaks."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await loop.sock_sendall(self.socket, await self.words.get())
        except OSError:
            return  # whoever reads finds out as well


class Desk:
    """All ranks' connections."""

    def __init__(
        self,
        came: Callable[[], None],
        heard: Callable[[int, FromRank], None],
        lost: Callable[[int, str], None],
    ) -> None:
        """`came()`, `heard(rank, message)`, `lost(rank, why)` are called on the loop's thread."""
        self._folder = tempfile.TemporaryDirectory(prefix="baton-trtllm-")
        self.path = str(Path(self._folder.name) / "ranks.sock")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen(64)
        self._listening.setblocking(False)
        self._came, self._heard, self._lost = came, heard, lost
        self.geometries: dict[int, Geometry] = {}
        self._connections: dict[int, Connection] = {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that are connected, the scheduler left out."""
        return tuple(sorted(it for it in self._connections if it != SCHEDULER))

    @property
    def scheduled(self) -> bool:
        """Whether rank 0's scheduler is connected."""
        return SCHEDULER in self._connections

    async def serve(self) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                own, _ = await loop.sock_accept(self._listening)
                tasks.create_task(self._serve(own))

    async def _serve(self, own: socket.socket) -> None:
        rank: int | None = None
        with own:
            try:
                require_own(own)
                connection = Connection(own)
                async with asyncio.timeout(CONNECT_SECONDS):
                    first = await connection.next()
                rank = self._welcome(connection, first)
                async with asyncio.TaskGroup() as tasks:
                    writing = tasks.create_task(connection.write())
                    why = await self._listen(rank, connection)
                    writing.cancel()
            except (OSError, EOFError, ValueError, TimeoutError, msgspec.DecodeError) as error:
                why = str(error)
        if rank is not None:
            del self._connections[rank]
            self._lost(rank, why)

    def _welcome(self, connection: Connection, first: FromRank) -> int:
        match first:
            case Geometry(rank=rank) if 0 <= rank < first.world:
                self.geometries[rank] = first
            case Scheduling():
                rank = SCHEDULER
            case _:
                raise ValueError(f"the first word is {type(first).__name__}")
        if rank in self._connections:
            raise ValueError(f"rank {rank} is here already")
        self._connections[rank] = connection
        self._came()
        return rank

    async def _listen(self, rank: int, connection: Connection) -> str:
        """Until the connection ends. Why it did."""
        try:
            while True:
                self._heard(rank, await connection.next())
        except (OSError, EOFError, ValueError, msgspec.DecodeError) as error:
            return str(error)

    def say(self, message: Message, *ranks: int) -> None:
        """Queue a message for these ranks, or for all and the scheduler."""
        data = frame(message)
        for rank in ranks or tuple(self._connections):
            connection = self._connections.get(rank)
            if connection is not None:
                connection.words.put_nowait(data)

    def give(self, rank: int, memory: Bytes, blocks: int, head_bytes: int) -> None:
        """Give a rank its arena. Before anything else is said to it.

        Raises:
            BackendMisconfigured: the rank is gone.
        """
        segment = segment_of(memory)
        connection = self._connections.get(rank)
        if segment is None or connection is None:
            raise BackendMisconfigured(f"rank {rank} of the engine is gone")
        data = frame(Arena(blocks, head_bytes, segment.offset))
        try:
            sent = socket.send_fds(connection.socket, [data], [segment.fd])
        except OSError as error:
            raise BackendMisconfigured(f"rank {rank} of the engine is gone: {error}") from error
        connection.words.put_nowait(data[sent:])

    def close(self) -> None:
        """Take no more connections, and remove the folder. Safe to call twice."""
        self._listening.close()
        self._folder.cleanup()
