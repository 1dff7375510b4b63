"""Tokens on their way from an engine to whoever takes them.

An engine does not pause. So the tokens of a sequence that is paused are kept, up to a bound; then
the engine is asked to end it, and what was kept is told when somebody wants it again. After that
the sequence is prefilled again, like one whose worker died.
"""

from __future__ import annotations

from collections.abc import Callable

from backends.api import Sampled
from backends.host.jobs import Given
from backends.host.loop import Item
from backends.host.work import Prefilling, Running

PAUSED_TOKENS = 256
"""So many are kept of a sequence that nobody lets go on."""


class Untold:
    """The jobs that have tokens to tell.

    `begin` is asked of each prefix in place whose sequences may all have one. `decoded` is told one
    token of each sequence at a time. `stop` ends a job, `lose` gives up a sequence.
    """

    def __init__(
        self,
        begin: Callable[[Prefilling], None],
        decoded: Callable[[list[tuple[Running, Sampled]]], None],
        stop: Callable[[Given], None],
        lose: Callable[[Item, str, str], None],
    ) -> None:
        self._begin = begin
        self._decoded = decoded
        self._stop = stop
        self._lose = lose
        self._jobs: dict[Given, None] = {}
        self.rounds = 0

    def add(self, one: Given) -> None:
        """This one may have a token, or may be over. Safe to call twice."""
        self._jobs[one] = None

    def tell(self) -> None:
        """Tell all that somebody can take now."""
        for work in {it.item for it in self._jobs if isinstance(it.item, Prefilling)}:
            self._begin(work)
        while ready := [one for one in self._jobs if one.tellable]:
            self.rounds += 1
            self._decoded([one.next() for one in ready])
        for one in [*self._jobs]:
            if one.item.ended:
                del self._jobs[one]
            elif not one.tokens and isinstance(one.item, Running):
                self._told(one)
            elif len(one.tokens) > PAUSED_TOKENS and not one.over:
                one.why = ("preempted", "nobody took its tokens")
                self._stop(one)

    def _told(self, one: Given) -> None:
        """What has ended while its tokens were kept is lost after them."""
        del self._jobs[one]
        if one.over:
            self._lose(one.item, *one.why)
