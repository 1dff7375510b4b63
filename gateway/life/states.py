"""The life of a request as a table.

    queued --> placed --> prefilling --> handing_over --> decoding --> done
      ^         |  ^          |               |              |
      |         |  +----------+---------------+--------------+   a worker failed: place again
      +---------+-------------+                                  it was full: wait again

From each of these it may also end as failed, cancelled or expired. A request whose sequences
must be placed apart (a worker died after they had diverged) goes on as several lives. One that is
adopted is placed already, and may be anywhere from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PLACED = "placed"
    PREFILLING = "prefilling"
    HANDING_OVER = "handing_over"
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


BAD_ENDS = frozenset({State.FAILED, State.CANCELLED, State.EXPIRED})

# Frames of the decode worker may overtake those of the prefill worker, so that `decoding` can
# follow `prefilling`; a sequence may end with its first token, so that `done` can follow both.
NEXT: Mapping[State, frozenset[State]] = {
    State.QUEUED: BAD_ENDS | {State.PLACED},
    State.PLACED: BAD_ENDS
    | {State.QUEUED, State.PLACED, State.PREFILLING, State.HANDING_OVER, State.DECODING},
    State.PREFILLING: BAD_ENDS
    | {State.QUEUED, State.HANDING_OVER, State.DECODING, State.DONE, State.PLACED},
    State.HANDING_OVER: BAD_ENDS | {State.DECODING, State.DONE, State.PLACED},
    State.DECODING: BAD_ENDS | {State.DONE, State.PLACED},
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}


class Impossible(Exception):
    """A transition that the table does not have: a bug."""


class Life:
    """One request's place in the table; `told` hears of every change."""

    def __init__(
        self, state: State = State.QUEUED, told: Callable[[State], None] = lambda _: None
    ) -> None:
        self.state = state
        self._told = told

    def become(self, state: State) -> None:
        """Go on to `state`.

        Raises:
            Impossible: the table has no such edge.
        """
        if state not in NEXT[self.state]:
            raise Impossible(f"{self.state} cannot become {state}")
        self.state = state
        self._told(state)
