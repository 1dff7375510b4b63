"""A data plane over the world's connections, one-sided like a network card's.

A write lands when it arrives, whatever has become of its landing: only the sender's acknowledgement
that it writes no more, or the end of the connection, makes a withdrawn landing quiet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests.chaos.control.backend import BLOCK_BYTES, BLOCK_TOKENS, TOKEN_BYTES
from transfer.contract import (
    Arrival,
    Buffer,
    KVSlice,
    Probe,
    Proof,
    Receipt,
    Source,
    nobody_cares,
    nobody_minds,
)
from transfer.convert import rest_of
from transfer.digest import PrefixDigest, landing_key, seal
from transfer.errors import LandingGone, PeerLost, TransferError
from transfer.landings import Expected, Landings
from transfer.layout import Endpoint, Epoch, KVLayout, Landing
from transfer.plan import plan

VERIFY_SECONDS = 0.001
CONNECT_SECONDS = 1.0

Part = tuple[int, bytes]
"""Where in a pool, and what."""


def pieces(
    pool: Buffer, source: Sequence[int], target: Sequence[int], start: int, end: int
) -> list[Part]:
    """Tokens `start` to `end` as they lie in `source` blocks, and where they belong."""
    parts = []
    for number in range(start // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
        first = max(start, number * BLOCK_TOKENS) - number * BLOCK_TOKENS
        last = min(end, (number + 1) * BLOCK_TOKENS) - number * BLOCK_TOKENS
        at = source[number] * BLOCK_BYTES
        data = bytes(pool[at + first * TOKEN_BYTES : at + last * TOKEN_BYTES])
        parts.append((target[number] * BLOCK_BYTES + first * TOKEN_BYTES, data))
    return parts


class WireReceiver:
    """The decode worker's end. `wrote` is called before each write lands, `claimed` when a right
    was accepted, with the epoch that was shown.
    """

    def __init__(self, layout: KVLayout, pool: Any, address: str) -> None:
        self.endpoint = Endpoint("tcp", address)
        self.landings = Landings(layout)
        self.wrote: Callable[[str, list[Part]], None] = lambda landing, parts: None
        self.claimed: Callable[[Expected, Epoch], None] = lambda entry, epoch: None
        self.pool = pool
        self._writers: dict[str, Incoming] = {}
        self._quiet: dict[str, asyncio.Future[None]] = {}
        self._server: Any = None

    async def start(self) -> None:
        """Listen."""
        host, _, port = self.endpoint.address.partition(":")
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Incoming(self), host, int(port))

    def expect(
        self,
        landing: Landing,
        pool: Buffer,
        *,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
        claimed: Callable[[], None] = nobody_minds,
        proofs: Sequence[Proof] = (),
    ) -> None:
        """As `Receiver.expect`."""
        self.landings.expect(landing, pool, touched, arrived, failed, claimed, proofs)

    def withdraw(self, landing_id: str) -> None:
        """As `Receiver.withdraw`."""
        self.landings.withdraw(landing_id)
        connection = self._writers.get(landing_id)
        if connection is not None and landing_id not in self._quiet:
            self._quiet[landing_id] = asyncio.get_running_loop().create_future()
            connection.send("withdrawn", landing_id)

    async def quiesce(self, landing_id: str) -> None:
        """As `Receiver.quiesce`."""
        waited = self._quiet.get(landing_id)
        if waited is not None:
            await asyncio.wait([waited])

    async def close(self) -> None:
        """As `Receiver.close`."""
        if self._server is not None:
            self._server.close()

    # ---- what a connection says

    def open(self, connection: Incoming, landing_id: str, right: Any) -> None:
        """Somebody shows a right."""
        try:
            entry = self.landings.claim(landing_id, *right, connection)
        except LandingGone as error:
            connection.send("gone", landing_id, str(error))
            return
        self.claimed(entry, right[0])
        self._writers[landing_id] = connection
        connection.entries[landing_id] = entry

    def write(self, connection: Incoming, landing_id: str, parts: list[Part]) -> None:
        """Bytes land: they were addressed when they left."""
        entry = connection.entries.get(landing_id)
        if entry is None:
            return
        self.wrote(landing_id, parts)
        for at, data in parts:
            self.pool[at : at + len(data)] = data
        if entry.state == "open":
            entry.touched()

    def commit(self, connection: Incoming, landing_id: str, said: Any) -> None:
        """All was written: verify, then settle."""
        entry = connection.entries.get(landing_id)
        if entry is None or entry.state != "open":
            connection.send("answer", landing_id, None, LandingGone(f"{landing_id} is over"))
            return
        entry.begin_verifying()
        settle = partial(self._settle, connection, entry, *said)
        asyncio.get_running_loop().call_later(VERIFY_SECONDS, settle)

    def _settle(
        self, connection: Incoming, entry: Expected, sent: bytes, sealed: bytes, note: bytes
    ) -> None:
        landing = entry.landing
        found = entry.digest()
        try:
            answer: bytes | None = entry.settle(found, sent, sealed, note, VERIFY_SECONDS)
            error: TransferError | None = None
        except TransferError as refusal:
            answer, error = None, refusal
        self.landings.forget(entry)
        connection.send("answer", landing.id, answer, error)

    def release(self, connection: Incoming, landing_id: str, why: TransferError) -> None:
        """Its writer writes no more."""
        entry = connection.entries.pop(landing_id, None)
        self._writers.pop(landing_id, None)
        waited = self._quiet.pop(landing_id, None)
        if waited is not None:
            waited.set_result(None)
        if entry is not None and entry.state == "open":
            entry.fail(why)
            self.landings.forget(entry)

    def lost(self, connection: Incoming) -> None:
        """Nothing more can come that way."""
        for landing_id in list(connection.entries):
            self.release(connection, landing_id, PeerLost("the connection to the sender was lost"))


class Incoming(asyncio.Protocol):
    """One connection at the receiver."""

    def __init__(self, receiver: WireReceiver) -> None:
        self._receiver = receiver
        self._transport: Any = None
        self.entries: dict[str, Expected] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiver.lost(self)

    def data_received(self, data: Any) -> None:
        what, landing_id, *rest = data
        receiver = self._receiver
        match what:
            case "open":
                receiver.open(self, landing_id, rest)
            case "write":
                receiver.write(self, landing_id, rest[0])
            case "commit":
                receiver.commit(self, landing_id, rest)
            case "abort" | "ack":
                receiver.release(self, landing_id, LandingGone("the sender gave up"))

    def send(self, *words: Any) -> None:
        """To the sender."""
        self._transport.write(words)


class WireSender:
    """The prefill worker's end: a connection to each decode worker it has met."""

    def __init__(self) -> None:
        self.lost: Callable[[Endpoint, PeerLost], None] = nobody_cares
        self._connections: dict[Endpoint, Outgoing] = {}

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """As `Sender.connect`."""
        host, _, port = endpoint.address.partition(":")
        made = Outgoing(lambda: self._has_lost(endpoint, made))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().create_connection(lambda: made, host, int(port))
        except (OSError, TimeoutError) as error:
            raise PeerLost(f"{endpoint.address}: {error}") from error
        self._connections[endpoint] = made
        return "as it is"

    async def probe(self, endpoint: Endpoint) -> Probe:
        """As `Sender.probe`."""
        return Probe()

    async def open(self, landing: Landing, source: Source) -> WireWriter:
        """As `Sender.open`."""
        connection = self._connections.get(landing.endpoints[0])
        if connection is None:
            raise PeerLost("not connected")
        return WireWriter(connection, landing, source)

    async def close(self) -> None:
        """As `Sender.close`."""
        for connection in list(self._connections.values()):
            connection.close()

    def _has_lost(self, endpoint: Endpoint, connection: Outgoing) -> None:
        if self._connections.get(endpoint) is connection:
            del self._connections[endpoint]
            self.lost(endpoint, PeerLost("the connection was lost"))


class Outgoing(asyncio.Protocol):
    """One connection at the sender."""

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost
        self._transport: Any = None
        self.writers: dict[str, WireWriter] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        for writer in list(self.writers.values()):
            writer.end(PeerLost("the connection was lost"))
        self._lost()

    def data_received(self, data: Any) -> None:
        what, landing_id, *rest = data
        writer = self.writers.get(landing_id)
        if what == "answer":
            if writer is not None:
                writer.answered(*rest)
            return
        if writer is not None:
            writer.end(LandingGone(f"landing {landing_id} is gone"))
        if what == "withdrawn":
            self.send("ack", landing_id)

    def send(self, *words: Any) -> None:
        """To the receiver."""
        self._transport.write(words)

    def close(self) -> None:
        """End it."""
        self._transport.close()


class WireWriter:
    """The sender's end of one handoff."""

    def __init__(self, connection: Outgoing, landing: Landing, source: Source) -> None:
        self._connection = connection
        self._landing = landing
        self._source = source
        self._error: TransferError | None = None
        self._answer: asyncio.Future[bytes] | None = None
        connection.writers[landing.id] = self
        connection.send("open", landing.id, landing.epoch, landing.secret)

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`."""
        if self._error is not None:
            raise self._error
        source, landing = self._source, self._landing
        rest = rest_of(part, landing.present)
        if rest is None:
            parts = []
        else:
            parts = pieces(source.pool, source.blocks, landing.blocks, rest.start, rest.end)
        self._connection.send("write", landing.id, parts)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`."""
        if self._error is not None:
            raise self._error
        landing, source = self._landing, self._source
        agreed, key = plan(source.layout, landing.layout), landing_key(landing)
        summed = PrefixDigest(
            agreed, source.pool, source.pool_blocks, source.blocks, source.tokens, key
        )
        summed.add_all(landing.present)
        digest = summed.result()
        self._connection.send("commit", landing.id, digest, seal(landing, digest, note), note)
        self._answer = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(seconds):
            answer = await self._answer
        return Receipt(VERIFY_SECONDS, answer, landing.tokens * TOKEN_BYTES)

    async def abort(self) -> None:
        """As `Writer.abort`."""
        if self._connection.writers.pop(self._landing.id, None) is not None:
            self._connection.send("abort", self._landing.id)

    def answered(self, answer: bytes | None, error: TransferError | None) -> None:
        """The verdict has come."""
        if self._answer is not None and not self._answer.done():
            if error is not None:
                self._answer.set_exception(error)
            else:
                self._answer.set_result(answer or b"")

    def end(self, error: TransferError) -> None:
        """It may not write any more."""
        self._error = self._error or error
        self._connection.writers.pop(self._landing.id, None)
        self.answered(None, error)
