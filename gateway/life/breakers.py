"""Circuit breakers: what fails again and again is left alone for a while, then tried once.

    closed --(failures)--> open --(its pause is over)--> half open --(one trial succeeds)--> closed
                            ^                                |
                            +------(it fails: twice the pause)

There is one for each worker, for what is its own fault (it crashes, its steps fail), and one for
each pair, for handoffs between the two. What a client does trips none: its bad request, its
leaving, its deadline; nor does a lack of room, a preemption or a drain.

No I/O and no clock here: the caller says what time it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import structlog

log = structlog.get_logger()

State = Literal["closed", "open", "half_open"]

WINDOW_SECONDS = 30.0
FAILURES = 3
"""So many failures in a window open it, where they are at least half of what was tried."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 10.0
MOST_OUTCOMES = 64

NOBODYS = frozenset(
    {"lost", "full", "invalid", "draining", "preempted", "deadline", "fenced"},
)
"""Codes that say nothing against whoever sent them. The fleet sees for itself who is lost."""


def culprit(phase: str, code: str) -> Literal["pair", "worker", "nobody"]:
    """Whose fault a failure of that code in that phase is."""
    if code in NOBODYS:
        return "nobody"
    return "pair" if phase == "handoff" else "worker"


class Shown(msgspec.Struct, frozen=True):
    """A breaker as `/admin/workers` shows it."""

    state: State
    reason: str
    retry_in_seconds: float


@dataclass(slots=True)
class Breaker:
    """One breaker. Times are of one clock, whichever."""

    reason: str = ""
    _outcomes: deque[tuple[float, bool]] = field(
        default_factory=lambda: deque(maxlen=MOST_OUTCOMES)
    )
    _failed_at: float = float("-inf")
    _pause: float = 0.0
    _opened_at: float = 0.0
    _trial: bool = False

    def state(self, now: float) -> State:
        """Whether it lets requests through: all, none, or one."""
        if not self._pause:
            return "closed"
        return "open" if now < self._opened_at + self._pause else "half_open"

    def admits(self, now: float) -> bool:
        """Whether a request may be placed there now."""
        state = self.state(now)
        return state == "closed" or (state == "half_open" and not self._trial)

    def enter(self, now: float) -> bool:
        """A request is placed there; True: it is the trial, and must end with `leave`."""
        if self.state(now) != "half_open" or self._trial:
            return False
        self._trial = True
        return True

    def leave(self) -> None:
        """The trial is over. Where it has neither succeeded nor failed, another one may follow."""
        self._trial = False

    def succeeded(self, now: float) -> bool:
        """Something went well there; True: that has closed it."""
        self._outcomes.append((now, True))
        if self.state(now) != "half_open":  # while it is open, that is old news
            return False
        self._pause, self.reason = 0.0, ""
        self._outcomes.clear()
        return True

    def failed(self, now: float, reason: str, began: float) -> bool:
        """What began then went wrong; True: that has opened it, or opened it again.

        Whatever ran there when something went wrong is hit by the same thing, and counts once.
        """
        state = self.state(now)
        if state == "open":
            return False
        if state == "half_open":
            self._open(now, min(2 * self._pause, LONGEST_PAUSE_SECONDS), reason)
            return True
        if began <= self._failed_at:
            return False
        self._failed_at = now
        self._outcomes.append((now, False))
        recent = [ok for at, ok in self._outcomes if now - at <= WINDOW_SECONDS]
        failures = len(recent) - sum(recent)
        if failures < FAILURES or 2 * failures < len(recent):
            return False
        self._open(now, FIRST_PAUSE_SECONDS, reason)
        return True

    def shown(self, now: float) -> Shown:
        """For people."""
        left = max(0.0, self._opened_at + self._pause - now) if self._pause else 0.0
        return Shown(self.state(now), self.reason, round(left, 3))

    @property
    def reopens_at(self) -> float:
        """When its pause is over."""
        return self._opened_at + self._pause

    def _open(self, now: float, pause: float, reason: str) -> None:
        self._opened_at, self._pause, self.reason = now, pause, reason
        self._trial = False


Pair = tuple[str, str]


class Breakers:
    """All breakers of one gateway, by a worker's id, and by a pair of ids.

    `clock` gives the time; `later(at, call)` calls then. `changed` is called when one opens, closes
    or may be tried.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        later: Callable[[float, Callable[[], None]], object],
        changed: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._later = later
        self._changed = changed
        self._breakers: dict[str | Pair, Breaker] = {}

    def admits(self, key: str | Pair) -> bool:
        """Whether a request may be placed there now."""
        breaker = self._breakers.get(key)
        return breaker is None or breaker.admits(self._clock())

    def why(self, key: str | Pair) -> str:
        """What opened it; empty where a request may be placed."""
        breaker = self._breakers.get(key)
        return "" if breaker is None or breaker.admits(self._clock()) else breaker.reason

    def enter(self, *keys: str | Pair) -> list[Breaker]:
        """A request is placed there; those breakers for which it is the trial."""
        now = self._clock()
        known = [self._breakers[key] for key in keys if key in self._breakers]
        return [breaker for breaker in known if breaker.enter(now)]

    def leave(self, trials: list[Breaker]) -> None:
        """That request is over."""
        for breaker in trials:
            breaker.leave()
        if trials:
            self._changed()

    def succeeded(self, *keys: str | Pair) -> None:
        """Something went well there."""
        for key in keys:
            breaker = self._breakers.get(key)
            if breaker is not None and breaker.succeeded(self._clock()):
                log.info("breaker.closed", **_named(key))
                self._changed()

    def failed(self, key: str | Pair, reason: str, began: float) -> None:
        """What began then went wrong there, and it is to blame."""
        breaker = self._breakers.setdefault(key, Breaker())
        if breaker.failed(self._clock(), reason, began):
            log.warning("breaker.opened", **_named(key), cause=reason)
            self._later(breaker.reopens_at, self._changed)
            self._changed()

    def shown(self, key: str | Pair) -> Shown:
        """For people."""
        return self._breakers.get(key, NEVER_FAILED).shown(self._clock())

    def forget(self, known: Collection[str]) -> None:
        """Drop what is about workers that are not known any more."""
        for key in list(self._breakers):
            concerned = {key} if isinstance(key, str) else set(key)
            if not concerned <= set(known):
                del self._breakers[key]


NEVER_FAILED = Breaker()


def _named(key: str | Pair) -> dict[str, str]:
    return {"worker": key} if isinstance(key, str) else {"prefill": key[0], "decode": key[1]}
