"""The way to one peer: scratch memory here, slots of an arena there, a connection to talk on.

All but `cut` is for the session's moving thread.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.convert import Frame
from transfer.errors import PeerMisbehaved
from transfer.nixl import wire
from transfer.nixl.agent import Agent, Transfer

I64 = NDArray[np.int64]

LOOK_SECONDS = 0.05
"""How often a wait looks whether it was cut."""

PROBE_SLOTS = 8
"""A probe fills so many slots, one after the other."""


class Slot:
    """A piece of scratch memory here, and the slot of the arena that belongs to it."""

    def __init__(self, number: int, memory: NDArray[np.uint8], there: int) -> None:
        """Begin free."""
        self.number = number
        self.memory = memory
        self.here = memory.ctypes.data
        self.there = there


class Load(msgspec.Struct):
    """Writes that were posted together, and the slot that they are read from, if it is one."""

    ticket: int
    transfer: Transfer
    slot: Slot | None = None
    ingest: wire.Ingest | None = None


class Way:
    """The way to one peer. A slot is free, then travels, then (if staged) waits to be ingested."""

    def __init__(
        self,
        agent: Agent,
        session: socket.socket,
        desk: socket.socket,
        terms: wire.Terms,
        scratch: NDArray[np.uint8],
    ) -> None:
        """Own `desk` from now on; `session` is the session's own connection.

        Raises:
            OSError: the peer's agent cannot be reached.
        """
        self.agent = agent
        self.scratch = scratch
        self._session = session
        self._desk = desk
        self._desk.settimeout(None)
        self._was_cut = threading.Event()
        self._torn = False
        self._peer = agent.meet(terms.metadata)
        self._free = deque(
            Slot(number, scratch[start : start + wire.SLOT_BYTES], terms.arena + start)
            for number, start in enumerate(range(0, wire.WINDOW_BYTES, wire.SLOT_BYTES))
        )
        self._travelling: deque[Load] = deque()
        self._asked: deque[Slot] = deque()

    @property
    def settled(self) -> bool:
        """Whether nothing of what was ever written can land any more."""
        return not self._torn and all(it.transfer.ended.is_set() for it in self._travelling)

    def warm(self, seconds: float) -> None:
        """Write a little to the arena, so that the first handoff need not wait for a connection.

        Raises:
            OSError: that failed, or took too long.
        """
        slot = self._free[0]
        transfer = self.agent.write(self._peer, _one(slot.here), _one(slot.there), _one(1))
        if not transfer.ended.wait(seconds):
            self._torn = True
            raise TimeoutError(f"a first write took more than {seconds} s")
        if transfer.error is not None:
            raise transfer.error
        wire.say(self._desk, wire.Busy(False))

    def probe(self) -> float:
        """Bytes per second with a few MB to the arena; raises as `where`."""
        wire.say(self._desk, wire.Busy(True))
        self.drain()
        begun = time.monotonic()
        for _ in range(PROBE_SLOTS):
            slot = self._take()
            self._post(-1, slot, _one(slot.here), _one(slot.there), _one(wire.SLOT_BYTES))
        self.drain()
        seconds = time.monotonic() - begun
        wire.say(self._desk, wire.Busy(False))
        return PROBE_SLOTS * wire.SLOT_BYTES / seconds

    def where(self, ticket: int, direct: bool) -> wire.There:
        """Where the landing of a ticket lies.

        Raises:
            OSError: the peer cannot be reached any more, or does not say.
        """
        wire.say(self._desk, wire.Where(ticket, direct))
        while not isinstance(answer := self._hear(), wire.There):
            pass
        if direct and answer.mark and not answer.starts:
            raise ConnectionAbortedError("it does not say where the landing lies")
        if answer.metadata:
            self.agent.learn(answer.metadata)
        return answer

    def send(self, ticket: int, here: I64, offsets: I64, lengths: I64, there: wire.There) -> None:
        """Write runs from where they lie to their places, unless too much travels; as `where`.

        They must stay as they are until `drain`.
        """
        while len(self._travelling) >= wire.SLOTS:
            self._advance()
        self._post(ticket, None, here, places(there, offsets), lengths)

    def put(self, ticket: int, frame: Frame, there: wire.There) -> None:
        """Write a frame to its places. Returns when `frame` may be changed; raises as `where`."""
        slot = self._fill(frame)
        here = np.cumsum(frame.lengths) - frame.lengths + slot.here
        self._post(ticket, slot, here, places(there, frame.offsets), frame.lengths)

    def stage(self, ticket: int, frame: Frame) -> None:
        """Write a frame to the arena, to be ingested from there; as `put`."""
        slot = self._fill(frame)
        offsets, lengths = frame.offsets.astype("<i8"), frame.lengths.astype("<i8")
        ingest = wire.Ingest(ticket, slot.number, offsets.tobytes(), lengths.tobytes())
        self._post(ticket, slot, _one(slot.here), _one(slot.there), _one(len(frame.data)), ingest)

    def push(self) -> None:
        """Have what is staged reach the pool without another call; raises as `where`."""
        while any(load.ingest for load in self._travelling):
            self._advance()

    def drain(self) -> None:
        """Wait until everything is where it belongs; raises as `where`."""
        while self._travelling or self._asked:
            self._advance()

    def arrive(self) -> None:
        """Wait until everything that travels has arrived; raises as `where`."""
        while self._travelling:
            self._advance()

    def quiet(self, ticket: int) -> None:
        """Wait until no write can land any more, of `ticket` at least. Never raises."""
        for load in self._travelling:
            if load.ticket == ticket:
                load.ingest = None
            load.transfer.ended.wait()
            self._torn |= load.transfer.error is not None
        if self._torn:
            # What was sent before it failed may lie in buffers on the way. Our word that nothing
            # can land would not be true: rather have the connection lost.
            with contextlib.suppress(OSError):
                self._session.shutdown(socket.SHUT_RDWR)
            self._travelling.clear()
        with contextlib.suppress(OSError, PeerMisbehaved):
            self.arrive()

    def cut(self) -> None:
        """Have whoever waits for the peer fail soon. Does not block."""
        self._was_cut.set()
        with contextlib.suppress(OSError):  # the peer may have closed it before us
            self._desk.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave the peer."""
        self._desk.close()
        self.agent.leave(self._peer)

    def _take(self) -> Slot:
        while not self._free:
            self._advance()
        return self._free.popleft()

    def _fill(self, frame: Frame) -> Slot:
        slot = self._take()
        slot.memory[: len(frame.data)] = frame.data
        return slot

    def _post(
        self,
        ticket: int,
        slot: Slot | None,
        here: I64,
        there: I64,
        lengths: I64,
        ingest: wire.Ingest | None = None,
    ) -> None:
        try:
            transfer = self.agent.write(self._peer, here, there, lengths)
        except OSError:
            self._torn = True  # some of it may be on its way
            raise
        self._travelling.append(Load(ticket, transfer, slot, ingest))

    def _advance(self) -> None:
        """Wait for whatever is due next."""
        if not self._travelling:
            self._hear()
            return
        load = self._travelling[0]
        while not load.transfer.ended.wait(LOOK_SECONDS):
            if self._was_cut.is_set():
                raise ConnectionAbortedError("the session has ended")
        if load.transfer.error is not None:
            self._torn = True
            raise load.transfer.error
        self._travelling.popleft()
        if load.slot is not None and load.ingest is None:
            self._free.append(load.slot)
        elif load.slot is not None:
            self._asked.append(load.slot)
            assert load.ingest is not None
            wire.say(self._desk, load.ingest)

    def _hear(self) -> wire.ToSender:
        try:
            message = wire.hear_receiver(self._desk)
        except PeerMisbehaved as error:
            raise ConnectionAbortedError(str(error)) from error
        if isinstance(message, wire.Ingested):
            if not self._asked or self._asked[0].number != message.slot:
                raise ConnectionAbortedError(f"slot {message.slot} was not asked for")
            self._free.append(self._asked.popleft())
        return message


def places(there: wire.There, offsets: I64) -> I64:
    """Addresses in the peer's memory of `offsets` of its pool's virtual array."""
    starts, bases = (np.asarray(it, np.int64) for it in (there.starts, there.bases))
    region = np.searchsorted(starts, offsets, side="right") - 1
    addresses: I64 = bases[region] + (offsets - starts[region])
    return addresses


def _one(number: int) -> I64:
    return np.array([number], np.int64)
