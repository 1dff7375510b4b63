"""What hosts a backend of either kind: the same surface, so that no one else need know which.

`steps.py` has the loop of a stepped backend, `engine.py` that of an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from backends.api import BackendInfo, Output, Sampled
from backends.host.work import Prefilling, Running

Item = Prefilling | Running


class Unusable(Exception):
    """The backend is of no more use. The worker must end; whoever started it starts it again."""


class DeviceHangs(Unusable):
    """A step, or an engine, does not answer."""


class EngineDied(Unusable):
    """An engine says that it cannot go on, or nobody knows what becomes of its memory."""


def sound(sampled: object, info: BackendInfo) -> bool:
    """Whether this is a token that can be sent: numpy's own numbers cannot."""
    return (
        isinstance(sampled, Sampled)
        and type(sampled.token) is int
        and 0 <= sampled.token < info.vocabulary
    )


class Outcome(Protocol):
    """Who is told what was computed. Called on the event loop."""

    def seated(self, work: Prefilling) -> None:
        """The prefix has its blocks, and is about to be computed for the first time."""

    def layer_ready(self, work: Prefilling, layer: int, start: int, end: int) -> None:
        """KV of these prefix positions is final in `layer`."""

    def prefilled(self, work: Prefilling, output: Output) -> None:
        """The prefix is computed; `output` has its sampled tokens, none if they were bound."""

    def decoded(self, results: list[tuple[Running, Sampled]]) -> None:
        """One step's new tokens, one for each sequence, of those that have not ended meanwhile."""

    def lost(self, item: Item, code: str, detail: str) -> None:
        """The work cannot go on here; prefilling it again may help."""


class Room(msgspec.Struct, frozen=True):
    """How full the memory is in which sequences are decoded, in blocks."""

    free: int
    blocks: int


class Pins(msgspec.Struct, frozen=True):
    """Memory outside the ledger: (job, blocks), and what is wrong with it, in words."""

    held: tuple[tuple[str, int], ...] = ()
    wrong: tuple[str, ...] = ()


class Loop(Protocol):
    """The only caller of one backend. On the event loop only."""

    @property
    def steps(self) -> int:
        """How many times tokens came."""

    @property
    def running(self) -> int:
        """Sequences being decoded."""

    @property
    def waiting(self) -> int:
        """Prefixes not yet computed."""

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens not yet computed."""

    @property
    def room(self) -> Room:
        """How full the memory is in which sequences are decoded."""

    @property
    def pins(self) -> Pins:
        """What the backend holds of memory that the ledger does not know."""

    def add_prefill(self, work: Prefilling) -> None:
        """Compute this prefix when its turn comes."""

    def add_running(
        self,
        sequences: Iterable[Running],
        *,
        ingested: Iterable[int] = (),
        copies: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Decode these, after taking note of and copying blocks."""

    def end(self, item: Item, release: Callable[[], None]) -> None:
        """Compute no more for `item`; `release` runs when nothing uses its blocks, maybe now."""

    def resume(self) -> None:
        """Something that could not go on may be able to now."""

    async def run(self) -> None:
        """Have the backend work until cancelled.

        Raises:
            Unusable: the worker must end.
        """

    async def close(self) -> None:
        """Wait until the backend does nothing more, and close it."""
