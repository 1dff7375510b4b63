"""Push slices over TCP: converted, digested and sent by one thread per connection.

`TcpSender` keeps one connection per decode worker, over which all handoffs to it travel. What a
`TcpWriter` is told to write is queued there, within a bound, so that `write` returns while the
next layer is still being computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from transfer.contract import KVSlice, Probe, Receipt, Source, nobody_cares
from transfer.convert import Conversion, Frame, Tamper, check_part
from transfer.digest import PrefixDigest, landing_key
from transfer.errors import DigestMismatch, LandingGone, PeerLost, TransferError
from transfer.layout import Endpoint, KVLayout, Landing
from transfer.plan import Plan, plan
from transfer.tcp import wire
from transfer.tcp.connection import Connection


class TcpSender:
    """Connections to decode workers, by their endpoint.

    `backlog_bytes` bounds what is queued per connection, `connect_seconds` the time to be
    welcomed, `stall_seconds` how long one write or an abort may make no progress before the
    connection counts as lost. `tamper` is for drills.
    """

    def __init__(
        self,
        *,
        secret: str = "",
        allow_unlike_weights: bool = False,
        backlog_bytes: int = 64 << 20,
        connect_seconds: float = 5.0,
        stall_seconds: float = 10.0,
    ) -> None:
        """Prepare; nothing is connected yet."""
        self.tamper: Tamper | None = None
        self.lost: Callable[[Endpoint, PeerLost], None] = nobody_cares
        self._secret = secret.encode()
        self._allow_unlike_weights = allow_unlike_weights
        self._backlog_bytes = backlog_bytes
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._connections: dict[tuple[str, str], Connection] = {}
        self._meeting: dict[tuple[str, str], asyncio.Lock] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """As `Sender.connect`."""
        agreed = self._plan(source, target)
        await self._meet(endpoint, target)
        return agreed.line

    async def probe(self, endpoint: Endpoint) -> Probe:
        """As `Sender.probe`: the round trip alone."""
        for (address, _), connection in self._connections.items():
            if address == endpoint.address:
                return Probe(round_trip_seconds=await connection.round_trip(self._stall_seconds))
        raise PeerLost(f"there is no connection to {endpoint.address}")

    async def open(self, landing: Landing, source: Source) -> TcpWriter:
        """As `Sender.open`."""
        agreed = self._plan(source.layout, landing.layout)
        endpoint = next((it for it in landing.endpoints if it.transport == "tcp"), None)
        if endpoint is None:
            raise PeerLost(f"worker {landing.worker} offers no tcp endpoint")
        connection = await self._meet(endpoint, landing.layout)
        return TcpWriter(connection, agreed, landing, source, self.tamper, self._stall_seconds)

    async def close(self) -> None:
        """As `Sender.close`."""
        self._closed = True
        connections = list(self._connections.values())
        self._connections.clear()
        for connection in connections:
            connection.lose(PeerLost("this sender was closed"))
        if connections:
            await asyncio.wait([it.ended for it in connections], timeout=self._stall_seconds)

    def _plan(self, source: KVLayout, target: KVLayout) -> Plan:
        return plan(source, target, allow_unlike_weights=self._allow_unlike_weights)

    async def _meet(self, endpoint: Endpoint, target: KVLayout) -> Connection:
        """The connection to `endpoint`, made anew where there is none."""
        key = (endpoint.address, target.fingerprint)
        async with self._meeting.setdefault(key, asyncio.Lock()):
            connection = self._connections.get(key)
            if connection is None or connection.lost is not None:
                connection = await self._dial(endpoint, target)
                if self._closed:
                    connection.lose(PeerLost("this sender was closed"))
                    raise PeerLost("this sender was closed")
                self._drop_lost()
                self._connections[key] = connection
        return connection

    def _mourn(self, endpoint: Endpoint, reason: PeerLost) -> None:
        self.lost(endpoint, reason)

    def _drop_lost(self) -> None:
        """Forget peers that are gone, so that restarts do not add up."""
        kept = {key: it for key, it in self._connections.items() if it.lost is None}
        busy = {key: it for key, it in self._meeting.items() if key in kept or it.locked()}
        self._connections, self._meeting = kept, busy

    async def _dial(self, endpoint: Endpoint, target: KVLayout) -> Connection:
        """Connect and be welcomed."""
        try:
            host, port = wire.host_and_port(endpoint)
        except ValueError as error:
            raise PeerLost(str(error)) from error
        connection = Connection(endpoint, self._backlog_bytes, self._stall_seconds, self._mourn)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_seconds):
                await loop.create_connection(lambda: connection, host, port)
                hello = wire.Hello(wire.VERSION, self._secret, target.fingerprint)
                await connection.submit(connection.send, hello)
                await connection.welcomed
        except TimeoutError as error:
            raise PeerLost(f"{endpoint.address} did not welcome us in time") from error
        except OSError as error:
            raise PeerLost(f"{endpoint.address} cannot be reached: {error}") from error
        finally:
            if not connection.welcomed.done():
                connection.welcomed.cancel()
            if connection.welcomed.cancelled():
                connection.lose(PeerLost("given up"))
        return connection


class TcpWriter:
    """The sender's end of one handoff."""

    def __init__(
        self,
        connection: Connection,
        agreed: Plan,
        landing: Landing,
        source: Source,
        tamper: Tamper | None,
        stall_seconds: float,
    ) -> None:
        """Show the right to `landing`; its refusal is heard at a later write or commit.

        Raises:
            ValueError: pool, blocks and tokens of either side contradict each other.
            PeerLost: the connection is lost.
        """
        self._connection = connection
        self._landing = landing
        self._plan = agreed
        self._tamper = tamper
        self._stall_seconds = stall_seconds
        self._conversion = Conversion(agreed, source, landing)
        self._digest = PrefixDigest(
            agreed,
            source.pool,
            source.pool_blocks,
            source.blocks,
            source.tokens,
            landing_key(landing),
        )
        self._jobs: set[asyncio.Future[None]] = set()
        loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[wire.Answer] = loop.create_future()
        self._put_down: asyncio.Future[None] = loop.create_future()
        self._error: BaseException | None = None
        self._committed = False
        self._stopped = False
        self._settled = False
        self._ticket = connection.enter(self)
        opening = wire.Open(self._ticket, landing.id, landing.epoch, landing.secret)
        self._submit(0, connection.send, opening)

    # ---- the contract -----------------------------------------------------------------------

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`; returns when `part` is queued. Each slice is written once."""
        check_part(part, self._plan.target.layers, self._conversion.tokens)
        self._raise_if_over()
        target = self._plan.target
        size = (part.end - part.start) * target.token_bytes // target.layers
        await self._connection.backlog.take(size)
        try:
            self._raise_if_over()
            self._submit(size, self._send_slice, part)
        except BaseException:
            self._connection.backlog.give(size)
            raise

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`."""
        if len(note) > wire.MAX_NOTE_BYTES:
            raise ValueError(f"note: {len(note)} bytes, at most {wire.MAX_NOTE_BYTES}")
        self._raise_if_over()
        self._committed = True
        self._submit(0, self._send_commit, note)
        async with asyncio.timeout(seconds):
            answer = await self._answer
        self._settle()
        if answer.outcome == "mismatch":
            raise DigestMismatch(answer.detail)
        return Receipt(answer.verify_seconds, answer.answer, answer.size)

    async def abort(self) -> None:
        """As `Writer.abort`."""
        self._stopped = True
        if not self._settled and self._connection.lost is None:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    self._submit(0, self._connection.send, wire.Abort(self._ticket))
                    await self._put_down
            except (TransferError, OSError) as error:
                self._connection.lose(PeerLost(f"an abort was not answered: {error!r}"))
        self._settle()
        if self._jobs:
            # What was queued skips itself, and after a loss every send fails at once.
            await asyncio.wait(self._jobs, timeout=self._stall_seconds)

    # ---- what the connection tells ----------------------------------------------------------

    def answered(self, answer: wire.Answer) -> None:
        """Hear how the handoff ended."""
        if answer.outcome == "aborted":
            self._release()
        elif answer.outcome == "gone":
            self._fail(LandingGone(answer.detail))
        elif self._committed and not self._answer.done():
            self._answer.set_result(answer)

    def lost(self, reason: PeerLost) -> None:
        """Hear that the connection broke."""
        self._fail(reason)
        self._release()

    # ---- in the connection's thread ---------------------------------------------------------

    def _send_slice(self, part: KVSlice) -> None:
        for frame in self._conversion.frames(part):
            if self._stopped or self._error is not None:
                return
            if self._tamper is None:
                self._send_frame(frame)
            elif (damaged := self._tamper(self._landing.id, frame)) is not None:
                self._send_frame(damaged)
        self._digest.add(part)

    def _send_frame(self, frame: Frame) -> None:
        message = wire.write_message(self._ticket, frame.offsets, frame.lengths)
        self._connection.send(message, frame.data)

    def _send_commit(self, note: bytes) -> None:
        if not self._stopped and self._error is None:
            self._connection.send(wire.Commit(self._ticket, self._digest.result(), note))

    # ---- on the event loop ------------------------------------------------------------------

    def _submit(self, size: int, job: Callable[..., None], *arguments: Any) -> None:
        future = self._connection.submit(job, *arguments)
        self._jobs.add(future)
        future.add_done_callback(partial(self._done, size))

    def _done(self, size: int, job: asyncio.Future[None]) -> None:
        self._jobs.discard(job)
        self._connection.backlog.give(size)
        error = None if job.cancelled() else job.exception()
        if isinstance(error, OSError):
            self._connection.lose(PeerLost(f"a write failed: {error!r}"))
        elif error is not None:
            self._fail(error)

    def _raise_if_over(self) -> None:
        if isinstance(self._error, TransferError):
            raise type(self._error)(str(self._error)) from self._error
        if self._error is not None:
            raise self._error
        if self._committed or self._stopped:
            raise LandingGone(f"landing {self._landing.id} was used already")

    def _settle(self) -> None:
        self._settled = True
        self._connection.leave(self._ticket)

    def _release(self) -> None:
        """Let an abort return."""
        if not self._put_down.done():
            self._put_down.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        if self._committed and not self._answer.done():
            self._answer.set_exception(error)
