"""Offer a pool to writers over NIXL, and know when none of them can write to it any more.

A sender that is told where a landing lies writes there by itself, whatever happens here: until
its word comes that it has stopped, or a proof (`wards.py`), the landing is not quiet. One that
only uses the arena is cut off here, as over TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.errors import PeerLost, PeerMisbehaved
from transfer.layout import Endpoint, KVLayout
from transfer.nixl import wire
from transfer.nixl.agent import Agent, Windows, require
from transfer.nixl.desk import Desk
from transfer.nixl.wards import Wards
from transfer.pool import Pool
from transfer.session import Offer, SessionReceiver
from transfer.session.handoff import Handoff, Peer

WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 -- refused, not listened on


class NixlReceiver(SessionReceiver):
    """A `Receiver` over NIXL; further arguments are those of `SessionReceiver`.

    `advertise` is the host name that senders are told, where it is not `host`. A peer of which
    nothing is heard for `stall_seconds` counts as dead. `pool` is registered at the start, any
    other when the first landing in it is written to; and stays so.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        pool: Pool | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str = "",
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        stall_seconds: float = 1.5,
        max_connections: int = 256,
        digest: bool = True,
    ) -> None:
        """Prepare; `start` makes the agent and begins to listen.

        Raises:
            ValueError: `host` stands for every address and `advertise` names none.
            ImportError: NIXL is not installed.
        """
        require()
        if not advertise and host in WILDCARDS:
            raise ValueError(f"advertise: must be set where host is {host!r}")
        self._nixl = NixlIntake(pool, host, port, advertise or host, stall_seconds)
        super().__init__(
            layout,
            self._nixl,
            secret=secret,
            tls=tls,
            stall_seconds=stall_seconds,
            max_connections=max_connections,
            digest=digest,
        )

    async def start(self) -> None:
        """Make the agent, register the pool, and listen.

        Raises:
            OSError: UCX finds nothing to work with, the pool cannot be registered, or the address
                not be listened on.
        """
        await asyncio.to_thread(self._nixl.begin)
        try:
            await super().start()
        except BaseException:
            self._nixl.agent.close()
            raise


class Guest:
    """One sender that was welcomed. `known` is how many pieces of memory it can write to."""

    def __init__(
        self, greeting: wire.Greeting, desk: Desk, arena: NDArray[np.uint8], known: int
    ) -> None:
        """Take note of it."""
        self.greeting = greeting
        self.desk = desk
        self.arena = arena
        self.known = known


class NixlIntake:
    """Listens at `host:port`, and says that it is reached at `advertise`."""

    def __init__(
        self, pool: Pool | None, host: str, port: int, advertise: str, stall_seconds: float
    ) -> None:
        """Prepare; `begin` comes first."""
        self._pool = pool
        self._host, self._port, self._advertise = host, port, advertise
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._guests: dict[Peer, Guest] = {}
        self._exposed: set[Handoff] = set()

    def begin(self) -> None:
        """Make the agent and register the pool; blocks.

        Raises:
            OSError: UCX finds nothing to work with, or the pool cannot be registered.
        """
        self.agent = Agent()
        try:
            for region in self._pool.regions if self._pool is not None else ():
                self.agent.register(region)
        except BaseException:
            self.agent.close()
            raise
        self._windows = Windows(self.agent, wire.WINDOW_BYTES)
        self._wards = Wards(self.agent, self._cut_all)

    def listen(self) -> tuple[socket.socket, Endpoint]:
        """As `Intake.listen`."""
        found = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, where = found[0][0], found[0][4]
        listener = socket.create_server(where[:2], family=family, backlog=128)
        return listener, wire.address(self._advertise, listener.getsockname()[1])

    def welcome(self, peer: Peer, hello: bytes) -> Offer:
        """As `Intake.welcome`."""
        greeting = wire.greeting(hello)
        peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if greeting.settled:
            peer.loop.call_soon_threadsafe(self._wards.settled, greeting.carrier)
        arena = self._windows.take()
        known, metadata = self.agent.metadata()
        with self._lock:
            self._guests[peer] = Guest(greeting, Desk(self, peer, arena), arena, known)
        self.agent.expect(peer)
        return Offer(msgspec.msgpack.encode(wire.Terms(metadata, arena.ctypes.data)))

    def join(self, peer: Peer, connection: socket.socket) -> None:
        """As `Intake.join`: where the sender asks."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            guest = self._guests.get(peer)
        if guest is not None and not peer.gone:
            with contextlib.suppress(PeerLost):  # it has ended meanwhile
                guest.desk.run(connection, self._stall_seconds)

    def prepare(self, handoff: Handoff) -> None:
        """As `Intake.prepare`: there is nothing to do."""

    def complete(self, handoff: Handoff, proof: bytes, then: Callable[[], None]) -> None:
        """As `Intake.complete`: the sender has waited until all had landed."""
        if proof:
            raise PeerMisbehaved(f"a proof of {len(proof)} bytes")
        then()

    def stopped(self, handoff: Handoff) -> None:
        """As `Intake.stopped`: quiet if it could not write by itself and nothing is copied."""
        with self._lock:
            guest = self._guests.get(handoff.peer)
            exposed = handoff in self._exposed
        if not exposed and not (guest and guest.desk.busy_with(handoff)):
            handoff.released()

    def acknowledged(self, handoff: Handoff) -> None:
        """As `Intake.acknowledged`."""
        self._forget(handoff)
        self.stopped(handoff)

    def parted(self, peer: Peer, handoffs: list[Handoff]) -> None:
        """As `Intake.parted`: what may still be written to waits for a proof."""
        with self._lock:
            guest = self._guests.pop(peer, None)
            exposed = [it for it in handoffs if it in self._exposed]
        self.agent.relax(peer)
        if guest is None:
            return
        guest.desk.cut()
        for handoff in handoffs:
            if handoff not in exposed:
                self._quiet_after(handoff, guest.desk)
        self._wards.take(peer.loop, guest.greeting, lambda: self._proven(guest, exposed))

    async def close(self) -> None:
        """As `Intake.close`."""
        self._wards.close()
        self.agent.close()

    # ---- what a desk asks, in its thread ----------------------------------------------------

    def admit(self, handoff: Handoff, *, direct: bool) -> wire.There:
        """As `Reception.admit`."""
        entry, peer = handoff.live, handoff.peer
        if entry is None:
            return wire.There()
        pool = entry.pool
        number = max(map(self.agent.register, pool.regions)) if direct else 0
        with self._lock:
            guest = self._guests.get(peer)
            if guest is None or handoff.live is None:
                return wire.There()
            if direct:
                self._exposed.add(handoff)
        self.agent.expect(handoff)
        peer.loop.call_soon_threadsafe(self._watch, handoff)
        mark = wire.mark_of(entry.landing)
        if not direct:
            return wire.There(mark)
        metadata = b""
        if number > guest.known:
            guest.known, metadata = self.agent.metadata()
        starts = tuple(pool.starts[:-1].tolist())
        return wire.There(mark, starts, tuple(pool.bases.tolist()), metadata)

    def busy(self, peer: Peer, writing: bool) -> None:
        """As `Reception.busy`."""
        if writing and not peer.gone:
            self.agent.expect(peer)
        else:
            self.agent.relax(peer)

    def left(self, handoff: Handoff) -> None:
        """As `Reception.left`."""
        handoff.peer.loop.call_soon_threadsafe(self.stopped, handoff)

    # ---- on the event loop ------------------------------------------------------------------

    def _watch(self, handoff: Handoff) -> None:
        handoff.quiet.add_done_callback(lambda _: self._forget(handoff))

    def _forget(self, handoff: Handoff) -> None:
        """It is not written to by itself any more."""
        with self._lock:
            self._exposed.discard(handoff)
        self.agent.relax(handoff)

    def _quiet_after(self, handoff: Handoff, desk: Desk) -> None:
        if not desk.busy_with(handoff):
            handoff.released()  # else `left` does it

    def _proven(self, guest: Guest, handoffs: list[Handoff]) -> None:
        self._windows.give(guest.arena)
        for handoff in handoffs:
            self.acknowledged(handoff)

    def _cut_all(self, reason: Exception) -> None:
        with self._lock:
            peers = list(self._guests)
        for peer in peers:
            peer.drop(reason)
