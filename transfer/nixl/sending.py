"""Write a prefix into another worker's memory. `mover.py` has the way to one peer."""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import structlog

from transfer.contract import KVSlice
from transfer.convert import Conversion, Frame
from transfer.errors import PeerMisbehaved
from transfer.layout import Endpoint
from transfer.nixl import wire
from transfer.nixl.agent import Agent, Windows, require
from transfer.nixl.mover import I64, Way
from transfer.pool import Pool
from transfer.session import Met, Outgoing, SessionSender

DIRECT_BYTES = 16 << 10
"""Runs of a frame at least this long on average are written straight to their places.

Two processes on two cores, 67 MB, NIXL 1.5.1: over UCX's TCP runs of 16 KiB took 42 ms (10 us
each), of 64 KiB 24 ms, and 1 MiB pieces 11 ms, to which staging adds a copy at either end; over
shared memory 15, 11 and 10 ms, and 20 ms for runs of 8 KiB. A list of descriptors prepared before
saves 0.07 us of the 4 us that the shortest one costs, so none is.
"""

MAX_RUNS = 256
"""So many runs, or about a megabyte, are posted at a time."""

SETTLE_SECONDS = 0.5
"""How long a new session waits for an earlier one to end, to be able to say that it has."""

log = structlog.get_logger(__name__)


class NixlSender(SessionSender):
    """A `Sender` over NIXL; further arguments are those of `SessionSender`.

    A peer of which nothing is heard for `stall_seconds` counts as dead. `direct_bytes` is
    `DIRECT_BYTES`, for networks that like it otherwise; `process` is who we say that we are.
    """

    def __init__(
        self,
        *,
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        allow_unlike_weights: bool = False,
        backlog_bytes: int = 64 << 20,
        connect_seconds: float = 5.0,
        stall_seconds: float = 1.5,
        direct_bytes: int = DIRECT_BYTES,
        process: wire.Process | None = None,
    ) -> None:
        """Prepare; the agent is made when the first peer is met.

        Raises:
            ImportError: NIXL is not installed.
        """
        require()
        super().__init__(
            NixlCarrier(process or wire.Process.here(), direct_bytes, connect_seconds),
            secret=secret,
            tls=tls,
            allow_unlike_weights=allow_unlike_weights,
            backlog_bytes=backlog_bytes,
            connect_seconds=connect_seconds,
            stall_seconds=stall_seconds,
        )


class NixlCarrier:
    """Reaches receivers, and remembers for each whether something may still land there."""

    transport = "nixl"

    def __init__(self, process: wire.Process, direct_bytes: int, connect_seconds: float) -> None:
        """Prepare; nothing is connected yet."""
        self._lock = threading.Lock()
        self._agent: Agent | None = None
        self._direct_bytes = direct_bytes
        self._connect_seconds = connect_seconds
        self._process = process
        self._name = secrets.token_hex(16)
        self._ending = threading.Condition()
        self._open: Counter[str] = Counter()
        self._torn: set[str] = set()

    def dial(self, endpoint: Endpoint, seconds: float) -> socket.socket:
        """As `Carrier.dial`."""
        connection = socket.create_connection(wire.host_and_port(endpoint), seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def hello(self, endpoint: Endpoint) -> bytes:
        """As `Carrier.hello`. Gives an earlier session time to end."""
        address = endpoint.address
        with self._ending:
            ended = self._ending.wait_for(lambda: not self._open[address], SETTLE_SECONDS)
        settled = ended and address not in self._torn
        return msgspec.msgpack.encode(wire.Greeting(self._name, self._process, settled))

    def meet(self, met: Met) -> NixlMover:
        """As `Carrier.meet`: a first write brings up whatever UCX needs."""
        terms = wire.terms(met.blob)
        agent = self._get_agent()
        desk = met.join()
        try:
            way = Way(agent, met.connection, desk, terms, self._scratch.take())
        except BaseException:
            desk.close()
            raise
        address = met.endpoint.address
        with self._ending:
            self._open[address] += 1
        mover = NixlMover(way, self._direct_bytes, lambda: self._parted(address, way))
        try:
            way.warm(self._connect_seconds)
        except BaseException:
            mover.cut()
            mover.close()
            raise
        return mover

    def close(self) -> None:
        """As `Carrier.close`."""
        with self._lock:
            if self._agent is not None:
                self._agent.close()

    def _get_agent(self) -> Agent:
        with self._lock:
            if self._agent is None:
                self._agent = Agent()
                self._scratch = Windows(self._agent, wire.WINDOW_BYTES)
            return self._agent

    def _parted(self, address: str, way: Way) -> None:
        with self._ending:
            self._open[address] -= 1
            self._ending.notify_all()
        if way.settled:
            self._scratch.give(way.scratch)
        else:  # and stays so: the receiver needs another proof than our word
            self._torn.add(address)


class NixlMover:
    """As long as one session lasts. `parted` is called once it has nothing under way."""

    waits_for_grant = False  # `Where` is answered once the receiver knows the writer

    def __init__(self, way: Way, direct_bytes: int, parted: Any) -> None:
        """Own `way` from now on."""
        self.way = way
        self._direct_bytes = direct_bytes
        self._parted = parted

    def begin(self, outgoing: Outgoing) -> NixlMove:
        """As `Mover.begin`."""
        return NixlMove(self.way, self._direct_bytes, outgoing)

    def probe(self) -> float:
        """As `Mover.probe`: to the arena and back to the start."""
        return self.way.probe()

    def cut(self) -> None:
        """As `Mover.cut`."""
        self.way.cut()

    def close(self) -> None:
        """As `Mover.close`."""
        self.way.close()
        self._parted()


class NixlMove:
    """One handoff as writes: from where its bytes lie, by way of scratch memory, or of both."""

    def __init__(self, way: Way, direct_bytes: int, outgoing: Outgoing) -> None:
        """Prepare; raises as `Mover.begin`."""
        self._way = way
        self._direct_bytes = direct_bytes
        self._outgoing = outgoing
        self._conversion = Conversion(outgoing.plan, outgoing.source, outgoing.landing)
        self._there: wire.There | None = None
        self._direct = False
        self._as_it_lies = self._conversion.verbatim and outgoing.tamper is None

    def write(self, part: KVSlice) -> None:
        """As `Move.write`."""
        if self._as_it_lies:
            here, offsets, lengths = self._conversion.moves(part)
            there = self._there or self._ask(lengths)
            if self._direct:
                self._send(here, offsets, lengths, there)
                self._add(part)
                self._way.arrive()  # the source may be overwritten once we return
                return
        self._write_frames(part)
        self._add(part)
        self._way.push()

    def settle(self) -> bytes:
        """As `Move.settle`: waits until everything has landed."""
        self._way.drain()
        return b""

    def release(self) -> None:
        """As `Move.release`: waits for the writes, which nobody can call off."""
        self._way.quiet(self._outgoing.ticket)

    def _send(self, here: I64, offsets: I64, lengths: I64, there: wire.There) -> None:
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths) and there.mark and not self._outgoing.over():
            due = ends[first] - lengths[first] + wire.SLOT_BYTES
            last = max(first + 1, min(int(np.searchsorted(ends, due)) + 1, first + MAX_RUNS))
            cut = slice(first, last)
            self._way.send(self._outgoing.ticket, here[cut], offsets[cut], lengths[cut], there)
            first = last

    def _write_frames(self, part: KVSlice) -> None:
        tamper, over = self._outgoing.tamper, self._outgoing.over
        for frame in self._conversion.frames(part):
            if over():
                return
            if tamper is None:
                self._put(frame)
            elif (damaged := tamper(self._outgoing.landing.id, frame)) is not None:
                self._put(damaged)

    def _add(self, part: KVSlice) -> None:
        """To the digest, while the bytes travel."""
        if self._outgoing.digest is not None and not self._outgoing.over():
            self._outgoing.digest.add(part)

    def _put(self, frame: Frame) -> None:
        there = self._there or self._ask(frame.lengths)
        if not there.mark:
            return  # the landing is gone, which the session says as well
        if self._direct:
            self._way.put(self._outgoing.ticket, frame, there)
        else:
            self._way.stage(self._outgoing.ticket, frame)

    def _ask(self, lengths: I64) -> wire.There:
        """Decide how to write, and learn where the landing lies."""
        self._direct = bool(lengths.mean() >= self._direct_bytes)
        if self._direct and self._as_it_lies:
            self._as_it_lies = self._register()
        there = self._way.where(self._outgoing.ticket, self._direct)
        landing = self._outgoing.landing
        if there.mark and there.mark != wire.mark_of(landing):
            raise PeerMisbehaved(f"landing {landing.id} is another one to its owner")
        self._there = there
        return there

    def _register(self) -> bool:
        """Whether the pool can be read from where it is."""
        source = self._outgoing.source
        try:
            for region in Pool.of(source.layout, source.pool_blocks, source.pool).regions:
                self._way.agent.register(region)
        except OSError as error:
            log.warning("pool.unregistered", reason=str(error))
            return False
        return True
