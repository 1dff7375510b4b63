"""Take frames over TCP straight into the pool; one thread for each data connection (`lane.py`).

Every frame is checked against its landing here, so that a landing which was withdrawn needs no
word from its sender to be quiet.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable

from transfer.errors import PeerMisbehaved
from transfer.landings import Expected
from transfer.layout import Endpoint, KVLayout
from transfer.session import Offer, SessionReceiver
from transfer.session.handoff import Handoff, Peer
from transfer.tcp import wire
from transfer.tcp.arrivals import Arrivals
from transfer.tcp.lane import Lane

WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 -- refused, not listened on


class TcpReceiver(SessionReceiver):
    """A `Receiver` over TCP; further arguments are those of `SessionReceiver`.

    `advertise` is the host name that senders are told, where it is not `host`.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str = "",
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        stall_seconds: float = 10.0,
        max_connections: int = 256,
        digest: bool = True,
    ) -> None:
        """Prepare; `start` begins to listen.

        Raises:
            ValueError: `host` stands for every address and `advertise` names none.
        """
        if not advertise and host in WILDCARDS:
            raise ValueError(f"advertise: must be set where host is {host!r}")
        super().__init__(
            layout,
            TcpIntake(host, port, advertise or host, stall_seconds, digest=digest),
            secret=secret,
            tls=tls,
            stall_seconds=stall_seconds,
            max_connections=max_connections,
            digest=digest,
        )


class TcpIntake:
    """Listens at `host:port`, and says that it is reached at `advertise`."""

    def __init__(
        self, host: str, port: int, advertise: str, stall_seconds: float, *, digest: bool = True
    ) -> None:
        """Prepare; nothing is listened on yet. Without `digest`, nothing is hashed."""
        self._host, self._port, self._advertise = host, port, advertise
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._lanes: dict[Peer, list[Lane]] = {}
        self._digest = digest

    def listen(self) -> tuple[socket.socket, Endpoint]:
        """As `Intake.listen`."""
        found = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, where = found[0][0], found[0][4]
        listener = socket.create_server(where[:2], family=family, backlog=128)
        wire.enlarge(listener)  # what it accepts inherits that
        return listener, wire.address(self._advertise, listener.getsockname()[1])

    def welcome(self, peer: Peer, hello: bytes) -> Offer:
        """As `Intake.welcome`."""
        wire.notice_death(peer.connection, self._stall_seconds)
        return Offer()

    def join(self, peer: Peer, connection: socket.socket) -> None:
        """As `Intake.join`: a data connection."""
        wire.notice_death(connection, self._stall_seconds)
        lane = Lane(self, peer, connection, self._stall_seconds)
        with self._lock:
            self._lanes.setdefault(peer, []).append(lane)
        try:
            if not peer.gone:
                lane.run()
        finally:
            with self._lock:
                lanes = self._lanes[peer]
                lanes.remove(lane)
                if not lanes:
                    del self._lanes[peer]

    def prepare(self, handoff: Handoff) -> None:
        """As `Intake.prepare`: its account, which the first frame then need not wait for."""
        if (entry := handoff.live) is not None:
            self.arrivals(handoff, entry)

    def complete(self, handoff: Handoff, proof: bytes, then: Callable[[], None]) -> None:
        """As `Intake.complete`: waits for as many bytes as were sent."""
        due = wire.proof_of(proof)
        entry = handoff.live
        if entry is None:
            return
        arrivals = self.arrivals(handoff, entry)
        with self._lock:
            arrivals.due, arrivals.then = due, then
            arrived = arrivals.arrived
        if arrived > due:
            raise PeerMisbehaved(f"{arrived} bytes, where {due} were committed")
        if arrived == due:
            then()

    def stopped(self, handoff: Handoff) -> None:
        """As `Intake.stopped`: quiet once no lane is in the landing."""
        with self._lock:
            lanes = list(self._lanes.get(handoff.peer, ()))
        if not any(lane.busy_with(handoff) for lane in lanes):
            handoff.released()

    def acknowledged(self, handoff: Handoff) -> None:
        """As `Intake.acknowledged`: it may have been quiet before."""
        self.stopped(handoff)

    def parted(self, peer: Peer, handoffs: list[Handoff]) -> None:
        """As `Intake.parted`: the lanes end, and whoever is in a landing leaves it."""
        with self._lock:
            lanes = list(self._lanes.get(peer, ()))
        for lane in lanes:
            lane.cut()
        for handoff in handoffs:
            self.stopped(handoff)

    async def close(self) -> None:
        """As `Intake.close`."""

    # ---- what lanes tell, in their threads ---------------------------------------------------

    def arrivals(self, handoff: Handoff, entry: Expected) -> Arrivals:
        """As `Reception.arrivals`."""
        with self._lock:
            if isinstance(handoff.summed, Arrivals):
                return handoff.summed
            handoff.summed = arrivals = Arrivals(entry, digest=self._digest)
            return arrivals

    def arrived(self, handoff: Handoff, arrivals: Arrivals, count: int) -> None:
        """As `Reception.arrived`."""
        with self._lock:
            arrivals.arrived += count
            arrived, due, then = arrivals.arrived, arrivals.due, arrivals.then
        if due is not None and arrived > due:
            raise PeerMisbehaved(f"{arrived} bytes, where {due} were committed")
        if arrived == due and then is not None:
            handoff.peer.loop.call_soon_threadsafe(then)

    def left(self, handoff: Handoff) -> None:
        """As `Reception.left`."""
        handoff.peer.loop.call_soon_threadsafe(self.stopped, handoff)
