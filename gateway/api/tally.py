"""What is noted of one request while it runs, for metrics and logs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.api.service import Observe
from gateway.life.job import Timeline

CLIENT_LEFT = 499


def _none() -> int:
    return 0


class Tally:
    """Begins when a request arrives. Its status is that of a client who left, until answered.

    `arrived` is on the event loop's clock, as deadlines are; durations are taken from a finer one.
    """

    __slots__ = (
        "_began",
        "_first",
        "arrived",
        "count",
        "prompt_tokens",
        "route",
        "status",
        "timelines",
    )

    def __init__(self, route: str) -> None:
        self._began = time.perf_counter()
        self.arrived = asyncio.get_running_loop().time()
        self._first: float | None = None
        self.route = route
        self.status = CLIENT_LEFT
        self.prompt_tokens = 0
        self.count: Callable[[], int] = _none
        self.timelines: list[Timeline] = []

    def first(self) -> None:
        """A token is there."""
        if self._first is None:
            self._first = time.perf_counter() - self._began

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that did not have to be computed."""
        return sum(timeline.cached_tokens for timeline in self.timelines)

    def report(self, observe: Observe) -> None:
        """Tell of the request, now that it is over."""
        observe(
            self.route,
            self.status,
            self.timelines[0] if self.timelines else None,
            self.prompt_tokens,
            self.count(),
            self._first,
            time.perf_counter() - self._began,
        )
