"""Who is next: the usual queues, and a model of Baton's, which is `gateway/admission/*.lua`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

FIRST_SECONDS, FIRST_SECONDS_PER_1000 = 1.0, 0.25
GAP_SECONDS = 0.03


@dataclass(eq=False)
class Request:
    """One request and what became of it. Times are seconds; tokens are counted."""

    number: int
    tenant: str
    arrived: float
    prompt: int
    answer: int
    needs: float = 0.0
    first: float | None = None
    ended: float | None = None
    refused: str = ""

    @property
    def due(self) -> float:
        """When its first token must be there."""
        return self.arrived + FIRST_SECONDS + FIRST_SECONDS_PER_1000 * self.prompt / 1000

    @property
    def in_time(self) -> bool:
        """Whether it kept its targets."""
        if self.first is None or self.ended is None or self.first > self.due:
            return False
        return self.ended - self.first <= GAP_SECONDS * max(0, self.answer - 1)


class Queue(Protocol):
    """Those that wait."""

    def push(self, request: Request, expected: int) -> None:
        """Stand in line; again at the old place after a worker had no room."""

    def head(self) -> Request | None:
        """Who is next."""

    def pop(self) -> None:
        """Take the head away."""


class Sorted:
    """Smallest key first."""

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int, Request]] = []

    def push(self, request: Request, expected: int) -> None:
        """See `Queue.push`."""
        heappush(self._heap, (self._key(request), request.number, request))

    def head(self) -> Request | None:
        """See `Queue.head`."""
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """See `Queue.pop`."""
        heappop(self._heap)


class Fair:
    """Start-time fair queueing over tenants by tokens, then smallest key: as `order.lua` has it.

    All tenants weigh the same here and are in one band.
    """

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key
        self._lines: dict[str, Sorted] = {}
        self._starts: dict[str, float] = {}
        self._clock = 0.0
        self._costs: dict[int, int] = {}

    def push(self, request: Request, expected: int) -> None:
        """See `Queue.push`."""
        line = self._lines.setdefault(request.tenant, Sorted(self._key))
        if line.head() is None:
            start = self._starts.get(request.tenant, 0.0)
            self._starts[request.tenant] = max(start, self._clock)
        self._costs[request.number] = request.prompt + expected
        line.push(request, expected)

    def _next(self) -> str | None:
        waiting = [tenant for tenant, line in self._lines.items() if line.head() is not None]
        return min(waiting, key=lambda tenant: (self._starts[tenant], tenant), default=None)

    def head(self) -> Request | None:
        """See `Queue.head`."""
        tenant = self._next()
        return self._lines[tenant].head() if tenant is not None else None

    def pop(self) -> None:
        """See `Queue.pop`."""
        tenant = self._next()
        assert tenant is not None
        request = self._lines[tenant].head()
        assert request is not None
        self._lines[tenant].pop()
        self._clock = max(self._clock, self._starts[tenant])
        self._starts[tenant] += self._costs.pop(request.number)
