"""A Redis server as a process, and the client that production code is given instead of its own.

The server loses its last second of writes when it crashes, or none, or all. The client does what
`gateway.admission.pipe` and `client` ask of `redis.asyncio.Redis`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Self

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from tests.chaos.control.redis_store import Snapshot, Store, Wrong, digest
from tests.chaos.control.world import ProcessLoop

HOST, PORT = "redis", 1
FSYNC_SECONDS = 1.0
EPOCH_SECONDS = 1_700_000_000
INFO = "# Server\r\nredis_version:6.2.14\r\nredis_mode:standalone\r\nrun_id:{}\r\n"


class Server:
    """One start of the server. `after` is called with each command that was carried out.

    `mutation` is a text in the scripts, and what replaces it.
    """

    def __init__(
        self, loop: ProcessLoop, kept: Snapshot | None, mutation: tuple[str, str] | None
    ) -> None:
        self.loop = loop
        self._mutation = mutation
        self.run_id = f"run{loop.world.now:.6f}"
        self.store = Store()
        self.store.published = self._publish
        self.scripts: dict[bytes, bytes] = {}
        self.after: Callable[[list[bytes], Any], None] = lambda words, answer: None
        self._subscribers: dict[bytes, dict[Session, None]] = {}
        self._published: list[tuple[Session, dict[str, Any]]] = []
        self._tell_time()
        if kept is not None:
            self.store.restore(kept)
        self._safe = self.store.copy()
        self._unsafe_since: float | None = None

    def session(self) -> Session:
        """A new connection."""
        return Session(self)

    def kept(self, loses: str) -> Snapshot | None:
        """What is on disk when it crashes: `nothing` is lost, the `last second`, or `all`."""
        if loses == "nothing":
            return self.store.copy()
        return self._safe if loses == "last second" else None

    def execute(self, session: Session, words: list[bytes]) -> Any:
        """One command; errors are answers."""
        self._tell_time()
        self._fsync()
        name = words[0].upper()
        try:
            answer = self._special(session, name, words)
            if answer is NotImplemented:
                answer = self.store.call(*words)
                self.after(words, answer)
        except Wrong as error:
            return ResponseError(str(error))
        self._tell_subscribers()
        return answer

    def _special(self, session: Session, name: bytes, words: list[bytes]) -> Any:
        if name == b"EVALSHA":
            source = self.scripts.get(words[1])
            if source is None:
                return NoScriptError("No matching script. Please use EVAL.")
            count = int(words[2])
            answer = self.store.run(source, words[3 : 3 + count], words[3 + count :])
            self.after(words, answer)
            return answer
        if name == b"SCRIPT":
            name = digest(words[2])
            old, new = self._mutation or ("", "")
            source = words[2].replace(old.encode(), new.encode()) if old else words[2]
            self.scripts[name] = source
            return name
        if name == b"INFO":
            return INFO.format(self.run_id).encode()
        if name == b"PING":
            return [b"pong", b""] if session.channels else b"PONG"
        if name == b"SUBSCRIBE":
            channel = words[1]
            session.channels.append(channel)
            self._subscribers.setdefault(channel, {})[session] = None
            return {"type": "subscribe", "channel": channel, "data": len(session.channels)}
        return NotImplemented

    def leave(self, session: Session) -> None:
        """A connection has ended."""
        for channel in session.channels:
            self._subscribers.get(channel, {}).pop(session, None)

    def _publish(self, channel: bytes, message: bytes) -> int:
        hearing = self._subscribers.get(channel, {})
        heard = {"type": "message", "channel": channel, "data": message}
        self._published += [(session, heard) for session in hearing]
        return len(hearing)

    def _tell_subscribers(self) -> None:
        """What a script publishes leaves once it has been carried out."""
        published, self._published = self._published, []
        for session, message in published:
            session.transport.write([message])

    def _tell_time(self) -> None:
        self.store.now_us = int((EPOCH_SECONDS + self.loop.world.now) * 1_000_000)

    def _fsync(self) -> None:
        """Writes are safe a second after they were made, at the latest."""
        now = self.loop.world.now
        if self._unsafe_since is None or now - self._unsafe_since >= FSYNC_SECONDS:
            self._safe = self.store.copy()
            self._unsafe_since = now


class Session(asyncio.Protocol):
    """One connection at the server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader = hiredis.Reader()
        self.channels: list[bytes] = []
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.leave(self)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        answers = []
        while (words := self._reader.gets()) is not False:
            answers.append(self._server.execute(self, words))
        if answers:
            self.transport.write(answers)


class Redis:
    """What production code takes for its client."""

    def __init__(self) -> None:
        self.connection_pool = self

    def make_connection(self) -> Connection:
        """As redis-py's pool."""
        return Connection()

    def pubsub(self) -> Subscription:
        """As redis-py."""
        return Subscription()


class Connection(asyncio.Protocol):
    """As redis-py's connection: commands out, answers in, an error once it is lost."""

    def __init__(self) -> None:
        self._answers: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._transport: Any = None
        self._lost = True

    async def connect(self) -> None:
        """Connect.

        Raises:
            OSError: nobody listens.
        """
        loop = asyncio.get_running_loop()
        self._lost = False
        self._transport, _ = await loop.create_connection(lambda: self, HOST, PORT)

    async def disconnect(self, nowait: bool = False) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.close()

    async def send_packed_command(self, data: Any, check_health: bool = True) -> None:
        """Send.

        Raises:
            redis.exceptions.ConnectionError: it was lost.
        """
        if self._lost:
            raise RedisConnectionError("the connection was lost")
        self._transport.write(data)

    async def read_response(self) -> Any:
        """The next answer.

        Raises:
            redis.exceptions.RedisError: what the server answered, or that it was lost.
        """
        while not self._answers:
            if self._lost:
                raise RedisConnectionError("the connection was lost")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        answer = self._answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def data_received(self, data: Any) -> None:
        self._answers.extend(data)
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Subscription:
    """As redis-py's `PubSub`."""

    def __init__(self) -> None:
        self._connection = Connection()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_: object) -> None:
        await self._connection.disconnect()

    async def subscribe(self, channel: str) -> None:
        """Connect and listen."""
        await self._connection.connect()
        await self._connection.send_packed_command(hiredis.pack_command(("SUBSCRIBE", channel)))

    async def ping(self) -> None:
        """Ask whether it is still there."""
        await self._connection.send_packed_command(hiredis.pack_command(("PING",)))

    async def get_message(self, timeout: float) -> Any:
        """The next message; None when there is none in time."""
        try:
            async with asyncio.timeout(timeout):
                message = await self._connection.read_response()
        except TimeoutError:
            return None
        return message if isinstance(message, dict) else {"type": "pong", "data": b""}
