"""What lies between processes: connections that keep order, take time, and break.

A message takes a while; those of one direction of one connection never overtake each other, those
of different connections do. Between two processes either direction may be held up or slow, and
all of their connections may be cut. When a process dies, what it has sent still arrives, and then
the end of the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.chaos.control.world import ProcessLoop, World

LATENCY_SECONDS = (0.0002, 0.002)
SLOW_FACTOR = 40
GAP_SECONDS = 1e-6

Watch = Callable[["End", Any], "Treatment | None"]


class Treatment:
    """What becomes of one message: how much later it comes, how often, and what it says then."""

    __slots__ = ("again", "data", "later")

    def __init__(self, data: Any, *, later: float = 0.0, again: bool = False) -> None:
        self.data = data
        self.later = later
        self.again = again


def latency(seed: int, number: int) -> float:
    """How long a message takes: it depends on its connection and place in it, and nothing else."""
    least, most = LATENCY_SECONDS
    return least + (most - least) * (hash((seed, number)) & 0xFFFFF) / 0x100000


class End:
    """One end of a connection, and the transport of the protocol there."""

    def __init__(self, network: Network, loop: ProcessLoop, address: str, seed: int) -> None:
        self.network = network
        self.loop = loop
        self.address = address
        self.peer: End
        self.protocol: Any = None
        self.lost = False
        self.closing = False
        self._seed = seed
        self._count = 0
        self._arrives = 0.0

    # ---- as asyncio's transport

    def write(self, data: Any) -> None:
        """Send."""
        if self.lost or self.closing or self.loop.dead:
            return
        told = self.network.watch(self, data)
        if self.lost or self.closing or self.loop.dead:  # struck just now
            return
        if told is None:
            self._post(self.peer._receive, data)
            return
        self._post(self.peer._receive, told.data, later=told.later)
        if told.again:
            self._post(self.peer._receive, told.data)

    def close(self) -> None:
        """Send what was written, then end the connection."""
        if not self.closing:
            self.closing = True
            self.finish()
            self.loop.call_soon(self.lose, None)

    abort = close

    def is_closing(self) -> bool:
        """Whether it takes no more."""
        return self.closing or self.lost

    def get_write_buffer_size(self) -> int:
        """Never anything: the wire holds what is under way."""
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Nothing is known."""
        return default

    # ---- what happens to it

    def finish(self) -> None:
        """Nothing more comes from this end."""
        self._post(self.peer.lose, None)

    def lose(self, error: Exception | None) -> None:
        """The connection is over."""
        if not self.lost:
            self.lost = True
            self.network.ends.get(self.loop, {}).pop(self, None)
            if self.protocol is not None:
                self.protocol.connection_lost(error)
            if not self.closing:
                self.closing = True
                self.finish()

    def reset(self) -> None:
        """What is under way to this end is lost, and the connection with it."""
        when = self.network.world.now + self._latency()
        self.network.world.at(self.loop, when, self.lose, _RESET)
        self.deaf = True

    deaf = False

    def _receive(self, data: Any) -> None:
        if not (self.lost or self.deaf or self.closing or self.network.world.over):
            self.protocol.data_received(data)

    def _latency(self) -> float:
        self._count += 1
        return latency(self._seed, self._count)

    def _post(self, act: Callable[[Any], None], data: Any, *, later: float = 0.0) -> None:
        network, target = self.network, self.peer.loop
        when = later + network.passes(self.loop.name, target.name, self._latency())
        self._arrives = max(when, self._arrives + GAP_SECONDS)
        network.world.at(target, self._arrives, act, data)


_RESET = ConnectionResetError("the connection was reset")


class Server:
    """What `create_server` answers with."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self.sockets = (self,)

    def getsockname(self) -> tuple[str, int]:
        """The address that was asked for."""
        host, _, port = self._address.partition(":")
        return host, int(port)

    def close(self) -> None:
        """Accept no more."""
        self._network.listeners.pop(self._address, None)

    async def wait_closed(self) -> None:
        """At once."""


class Network:
    """All connections of one world. `watch` sees every message as it leaves."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.listeners: dict[str, tuple[ProcessLoop, Callable[[], Any]]] = {}
        self.ends: dict[ProcessLoop, dict[End, None]] = {}
        self.watch: Watch = lambda end, data: None
        self._seed = seed
        self._count = 0
        self._held: dict[tuple[str, str], float] = {}
        self._slow: dict[tuple[str, str], float] = {}

    def listen(self, loop: ProcessLoop, factory: Callable[[], Any], address: str) -> Server:
        """Accept connections at `address`."""
        self.listeners[address] = (loop, factory)
        return Server(self, address)

    async def connect(
        self, loop: ProcessLoop, factory: Callable[[], Any], address: str
    ) -> tuple[End, Any]:
        """Connect to whoever listens at `address` once the wish has arrived there.

        Raises:
            ConnectionRefusedError: nobody does.
            ConnectionResetError: it was cut at once.
        """
        self._count += 1
        seed = hash((self._seed, self._count))
        name = address.partition(":")[0]
        done = loop.create_future()
        there = self.passes(loop.name, name, latency(seed, 0))
        self.world.at(loop, there, self._arrive, loop, address, seed, done)
        try:
            theirs: End | None = await done
        except asyncio.CancelledError:
            if done.done() and not done.cancelled() and done.result() is not None:
                done.result().peer.close()
            raise
        if theirs is None:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        mine = theirs.peer
        if mine.lost:
            raise ConnectionResetError("the connection was reset")
        protocol = factory()
        mine.protocol = protocol
        protocol.connection_made(mine)
        return mine, protocol

    def _arrive(
        self, loop: ProcessLoop, address: str, seed: int, done: asyncio.Future[End | None]
    ) -> None:
        accepting = self.listeners.get(address)
        if done.done():
            return
        if accepting is None:
            done.set_result(None)
            return
        server, factory = accepting
        mine, theirs = End(self, loop, address, seed), End(self, server, address, seed + 1)
        mine.peer, theirs.peer = theirs, mine
        for end in (mine, theirs):
            self.ends.setdefault(end.loop, {})[end] = None
        theirs.protocol = factory()
        # The kernel accepts, even for a process that stands still.
        server.call_soon(theirs.protocol.connection_made, theirs)
        done.set_result(theirs)

    # ---- what strikes

    def passes(self, source: str, target: str, seconds: float) -> float:
        """When something that leaves now and takes so many seconds arrives."""
        now, way = self.world.now, (source, target)
        if self._slow and self._slow.get(way, 0.0) > now:
            seconds *= SLOW_FACTOR
        return (max(now, self._held.get(way, 0.0)) if self._held else now) + seconds

    def hold_up(self, source: str, target: str, seconds: float) -> None:
        """Let nothing pass that way for a while; it comes afterwards."""
        self._held[source, target] = self.world.now + seconds

    def slow_down(self, one: str, other: str, seconds: float) -> None:
        """Make the way between two processes long for a while."""
        for way in ((one, other), (other, one)):
            self._slow[way] = self.world.now + seconds

    def cut(self, one: str, other: str) -> None:
        """Reset every connection between two processes."""
        for loop, ends in self.ends.items():
            if loop.name == one:
                for end in [it for it in ends if it.peer.loop.name == other]:
                    end.reset()
                    end.peer.reset()

    def abandon(self, loop: ProcessLoop) -> None:
        """A process has died: its kernel ends its connections, and nobody listens any more."""
        self.listeners = {a: it for a, it in self.listeners.items() if it[0] is not loop}
        for end in self.ends.pop(loop, {}):
            end.lost = True
            end.finish()
