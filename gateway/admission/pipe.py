"""One connection to Redis that any number of tasks share.

What they ask during one turn of the event loop leaves together, and answers come back in order;
there is no pool to wait for. While the connection is down every call fails at once. It knows
scripts and connections, and nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import hiredis
import structlog
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from gateway.admission.client import check_server
from gateway.admission.scripts import ScriptName, script
from gateway.errors import QueueUnavailable

log = structlog.get_logger()

Argument = str | bytes | int
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 1.0
LEAST_WATCH_SECONDS = 0.001


async def _nothing() -> None:
    return


class Pipe:
    """Runs while `run` does.

    Each new connection is told the `scripts` that will be asked for, and then `greet` is awaited,
    before other calls.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        use: str,
        scripts: Sequence[ScriptName],
        timeout_seconds: float,
        greet: Callable[[], Awaitable[None]] = _nothing,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._redis = redis
        self._log = log.bind(use=use)
        self._scripts = scripts
        self._timeout = timeout_seconds
        self._greet = greet
        self._lost = lost
        self._open = False
        self._ready = asyncio.Event()
        self._out: list[bytes] = []
        self._more = asyncio.Event()
        self._pending: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._cause = "not connected yet"
        self.server = ""  # which one it is: another one after each of its starts
        self.former_server = ""  # the one before

    @property
    def ready(self) -> bool:
        """Whether calls are answered."""
        return self._ready.is_set()

    async def until_ready(self) -> None:
        """Return once calls are answered."""
        await self._ready.wait()

    async def run(self) -> None:
        """Keep the connection, until cancelled.

        Raises:
            RedisUnsuitable: this server can never be used.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            # In a task of its own: before Python 3.13, a task group that fails just as its task is
            # cancelled hides the cancellation.
            async with asyncio.TaskGroup() as one:
                served = one.create_task(self._serve())
            pause = (
                FIRST_PAUSE_SECONDS if served.result() else min(2 * pause, LONGEST_PAUSE_SECONDS)
            )
            await asyncio.sleep(pause)

    async def _serve(self) -> bool:
        """Over one connection, until it is lost; whether it was ready before."""
        connection = self._connection()
        was_ready = False
        try:
            try:
                async with asyncio.timeout(self._timeout):
                    await connection.connect()
                self._open = True
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._write(connection))
                    tasks.create_task(self._read(connection))
                    tasks.create_task(self._watch())
                    tasks.create_task(self._begin())
            finally:
                was_ready = self.ready
                self._close()
                await connection.disconnect(nowait=True)
        except* (RedisError, OSError, QueueUnavailable) as errors:
            self._note(errors, was_ready)
        return was_ready

    async def script(self, name: ScriptName, keys: tuple[str, ...], *words: Argument) -> Any:
        """Run one of our scripts, once the server has been greeted.

        Raises:
            QueueUnavailable: there is no connection, it broke, or the server refused. Whether
                the script was carried out is then unknown.
        """
        if not self.ready:
            raise QueueUnavailable(f"Redis does not answer: {self._cause}")
        return await self.ask_script(name, keys, *words)

    async def ask(self, *words: Argument) -> Any:
        """As `call`, but also while greeting."""
        try:
            return await self._send(words)
        except ResponseError as error:
            raise QueueUnavailable(f"Redis refused: {error}") from error

    async def ask_script(self, name: ScriptName, keys: tuple[str, ...], *words: Argument) -> Any:
        """As `script`, but also while greeting."""
        command = ("EVALSHA", script(name).digest, len(keys), *keys, *words)
        try:
            return await self._send(command)
        except NoScriptError:
            await self._load([name])
            return await self.ask(*command)
        except ResponseError as error:
            raise QueueUnavailable(f"Redis refused: {error}") from error

    def _connection(self) -> Any:
        pool: Any = self._redis.connection_pool  # which knows addresses, passwords and certificates
        return pool.make_connection()

    def _send(self, words: tuple[Argument, ...]) -> asyncio.Future[Any]:
        if not self._open:
            raise QueueUnavailable(f"Redis does not answer: {self._cause}")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._pending.append((answer, loop.time()))
        self._out.append(hiredis.pack_command(cast("Any", words)))
        self._more.set()
        return answer

    async def _begin(self) -> None:
        server = check_server(await self.ask("INFO", "server"))
        if self.server not in ("", server):
            self.former_server = self.server
        self.server = server
        await self._load(self._scripts)
        await self._greet()
        self._ready.set()
        self._log.info("redis.connected")

    async def _load(self, names: Sequence[ScriptName]) -> None:
        """All of them in one round trip."""
        loads = [self._send(("SCRIPT", "LOAD", script(name).source)) for name in names]
        try:
            await asyncio.gather(*loads)
        except ResponseError as error:
            raise QueueUnavailable(f"Redis refused: {error}") from error

    async def _write(self, connection: Any) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            data = b"".join(self._out)
            self._out.clear()
            await connection.send_packed_command(data, check_health=False)

    async def _read(self, connection: Any) -> None:
        while True:
            failure: ResponseError | None = None
            answer: Any = None
            try:
                answer = await connection.read_response()
            except ReadOnlyError:  # a former primary: reconnecting finds the new one
                raise
            except ResponseError as error:
                failure = error
            waiter, _ = self._pending.popleft()
            if waiter.done():
                continue
            if failure is not None:
                waiter.set_exception(failure)
            else:
                waiter.set_result(answer)

    async def _watch(self) -> None:
        """A server that is connected but mute is as good as gone."""
        loop = asyncio.get_running_loop()
        while True:
            asked_at = self._pending[0][1] if self._pending else loop.time()
            left = asked_at + self._timeout - loop.time()
            if left <= 0:
                raise RedisConnectionError(f"no answer within {self._timeout} s")
            # What is left may be too little to be added to the time.
            await asyncio.sleep(max(left, LEAST_WATCH_SECONDS))

    def _close(self) -> None:
        self._open = False
        self._ready.clear()
        self._out.clear()
        self._more.clear()
        while self._pending:
            waiter, _ = self._pending.popleft()
            if not waiter.done():
                waiter.set_exception(QueueUnavailable("Redis was lost before it answered"))

    def _note(self, errors: BaseExceptionGroup[BaseException], was_ready: bool) -> None:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        cause = str(first) or type(first).__name__
        if was_ready:
            self._log.warning("redis.lost", cause=cause)
            self._lost()
        elif cause != self._cause:
            self._log.warning("redis.unreachable", cause=cause)
        self._cause = cause
