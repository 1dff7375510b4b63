"""Sessions with decode workers, kept and warmed, and a writer for each handoff."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Self

from transfer.contract import Probe, Source, nobody_cares
from transfer.convert import Tamper, TamperNote
from transfer.errors import PeerLost
from transfer.layout import Endpoint, KVLayout, Landing, Shard
from transfer.plan import Plan, plan
from transfer.session.meeting import Caller
from transfer.session.mover import Carrier
from transfer.session.outgoing import Session
from transfer.session.writing import SessionWriter

Key = tuple[str, str, str]


class SessionSender:
    """A `Sender` over any stream socket; `carrier` is the transport.

    `backlog_bytes` bounds what is queued per peer, `connect_seconds` the time to be welcomed,
    `stall_seconds` how long a peer may be silent, one write make no progress or an abort take
    before the session counts as lost. `tls` is a client's context. `tamper` and `tamper_note` are
    for drills.
    """

    def __init__(
        self,
        carrier: Carrier,
        *,
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        allow_unlike_weights: bool = False,
        backlog_bytes: int = 64 << 20,
        connect_seconds: float = 5.0,
        stall_seconds: float = 10.0,
    ) -> None:
        """Prepare; nothing is connected yet."""
        self.tamper: Tamper | None = None
        self.tamper_note: TamperNote | None = None
        self.lost: Callable[[Endpoint, PeerLost], None] = nobody_cares
        self._carrier = carrier
        self._secret = secret.encode()
        self._tls = tls
        self._allow_unlike_weights = allow_unlike_weights
        self._backlog_bytes = backlog_bytes
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._sessions: dict[Key, Session] = {}
        self._meeting: dict[Key, asyncio.Lock] = {}
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
        await self._session(endpoint, agreed)
        return agreed.line

    async def probe(self, endpoint: Endpoint) -> Probe:
        """As `Sender.probe`."""
        for (address, *_), session in self._sessions.items():
            if address == endpoint.address:
                seconds = await session.round_trip()
                return Probe(await session.bytes_per_second(), seconds)
        raise PeerLost(f"there is no connection to {endpoint.address}")

    async def open(self, landing: Landing, source: Source) -> SessionWriter:
        """As `Sender.open`."""
        agreed = self._plan(source.layout, landing.layout, landing.heads)
        transport = self._carrier.transport
        endpoint = next((it for it in landing.endpoints if it.transport == transport), None)
        if endpoint is None:
            raise PeerLost(f"worker {landing.worker} offers no {transport} endpoint")
        session = await self._session(endpoint, agreed)
        return SessionWriter(session, agreed, landing, source, self.tamper, self.tamper_note)

    async def close(self) -> None:
        """As `Sender.close`."""
        self._closed = True
        sessions = list(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            session.lose(PeerLost("this sender was closed"))
        if sessions:
            await asyncio.wait([it.ended for it in sessions], timeout=self._stall_seconds)
        self._carrier.close()

    def _plan(self, source: KVLayout, target: KVLayout, heads: Shard | None = None) -> Plan:
        return plan(source, target, allow_unlike_weights=self._allow_unlike_weights, heads=heads)

    async def _session(self, endpoint: Endpoint, agreed: Plan) -> Session:
        """The session with `endpoint`, made anew where there is none."""
        key = (endpoint.address, agreed.target.fingerprint, agreed.source.weights)
        async with self._meeting.setdefault(key, asyncio.Lock()):
            session = self._sessions.get(key)
            if session is None or session.lost is not None:
                session = await self._meet(endpoint, agreed)
                self._drop_lost()
                self._sessions[key] = session
        return session

    def _drop_lost(self) -> None:
        """Forget peers that are gone, so that restarts do not add up."""
        kept = {key: it for key, it in self._sessions.items() if it.lost is None}
        busy = {key: it for key, it in self._meeting.items() if key in kept or it.locked()}
        self._sessions, self._meeting = kept, busy

    async def _meet(self, endpoint: Endpoint, agreed: Plan) -> Session:
        """Connect and be welcomed."""
        if endpoint.transport != self._carrier.transport:
            raise PeerLost(f"{endpoint.address} is an endpoint of {endpoint.transport}")
        times = self._connect_seconds, self._stall_seconds
        caller = Caller(self._carrier, self._secret, self._tls, *times)
        acquaintance = await caller.meet(endpoint, agreed)
        if self._closed:
            acquaintance.drop()
            raise PeerLost("this sender was closed")
        return Session(
            endpoint,
            acquaintance,
            backlog_bytes=self._backlog_bytes,
            stall_seconds=self._stall_seconds,
            mourn=lambda reason: self.lost(endpoint, reason),
        )
