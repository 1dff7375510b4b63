"""Bring what an engine says, in whichever of its threads, to the event loop in its order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

import msgspec

from backends.api import Output, Sampled


class Ready(msgspec.Struct, frozen=True):
    """See `Events.ready`."""

    job: str
    start: int
    end: int
    layer: int | None


class Prefilled(msgspec.Struct, frozen=True):
    """See `Events.prefilled`."""

    job: str
    output: Output
    cached: int


class Imported(msgspec.Struct, frozen=True):
    """See `Events.imported`."""

    job: str


class Decoded(msgspec.Struct, frozen=True):
    """See `Events.decoded`."""

    tokens: tuple[tuple[str, Sampled], ...]


class Failed(msgspec.Struct, frozen=True):
    """See `Events.failed`."""

    job: str
    error: Exception


class Ended(msgspec.Struct, frozen=True):
    """See `Events.ended`."""

    job: str


class Died(msgspec.Struct, frozen=True):
    """See `Events.died`."""

    reason: str


Event = Ready | Prefilled | Imported | Decoded | Failed | Ended | Died


class Inbox:
    """An engine's `Events`. `wake` is called on `loop` when there is something to take out."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._wake = wake
        self._events: deque[Event] = deque()  # safe from any thread
        self._told = False

    def ready(self, job: str, start: int, end: int, layer: int | None = None) -> None:
        """See `Events`."""
        self._put(Ready(job, start, end, layer))

    def prefilled(self, job: str, output: Output, cached: int = 0) -> None:
        """See `Events`."""
        self._put(Prefilled(job, output, cached))

    def imported(self, job: str) -> None:
        """See `Events`."""
        self._put(Imported(job))

    def decoded(self, tokens: Items[tuple[str, Sampled]]) -> None:
        """See `Events`."""
        self._put(Decoded(tuple(tokens)))

    def failed(self, job: str, error: Exception) -> None:
        """See `Events`."""
        self._put(Failed(job, error))

    def ended(self, job: str) -> None:
        """See `Events`."""
        self._put(Ended(job))

    def died(self, reason: str) -> None:
        """See `Events`."""
        self._put(Died(reason))

    def take(self) -> Iterator[Event]:
        """All that is there now, the oldest first."""
        self._told = False  # first: what comes from now on wakes again
        for _ in range(len(self._events)):
            yield self._events.popleft()

    def _put(self, event: Event) -> None:
        self._events.append(event)
        if self._told:
            return
        self._told = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: nobody wants to know any more
            return
