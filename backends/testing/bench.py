"""What both benches are: a plug-in on its desk, a reference engine beside it, and prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from backends.api import BackendInfo, Sampling
from backends.errors import BackendError
from backends.testing.alike import judging
from backends.testing.desk import Desk
from backends.testing.form import Unproven, described
from backends.testing.making import Maker

STEPS = 8
"""Tokens that a prompt is continued by, in most promises."""

LONGEST_TOKENS = 160
MODEST = {"pool_tokens": 2048, "context_tokens": 512}
"""What the plug-in gets where it takes that and nothing else was said: the kit needs no more."""


class Holding(Protocol):
    """A desk: what has a backend and gives its blocks out."""

    info: BackendInfo

    def clear(self) -> None:
        """Every block is free again."""

    def close(self) -> None:
        """Give the device back."""


D = TypeVar("D", bound=Holding)


class DeskBench(ABC, Generic[D]):
    """Makes the plug-in and the reference as often as it takes, and closes them.

    `absent` says why there is no reference, where there is none.
    """

    def __init__(
        self, maker: Maker, reference: Maker | None, absent: str, *, made: Any = None
    ) -> None:
        """Nothing is made yet, unless one is `made` already."""
        self.maker = maker
        self._absent = absent
        self._made = made
        self._reference_maker = reference
        self._desk: D | None = None
        self._reference: Desk | None = None

    @abstractmethod
    def place(self, backend: Any) -> D:
        """A desk for the plug-in."""

    # ---- desks

    @property
    def desk(self) -> D:
        """The plug-in with its options, all blocks free: the same one from promise to promise."""
        if self._desk is None:
            backend, self._made = self._made or self.maker.make(), None
            self._desk = self.place(backend)
        return self._desk

    @property
    def reference(self) -> Desk:
        """The engine that the plug-in is measured by: a stepped backend for the same model.

        Raises:
            Unproven: there is none, or it is for another model.
        """
        if self._reference is None:
            if self._reference_maker is None:
                raise Unproven(f"there is no reference engine: {self._absent}")
            try:
                self._reference = Desk(self._reference_maker.make(), seed=1)
            except (BackendError, ImportError) as error:
                self._reference_maker, self._absent = None, described(error)
                raise Unproven(f"the reference engine cannot be used: {self._absent}") from error
        ours, theirs = self.info.layout, self._reference.layout
        if ours.model != theirs.model:
            raise Unproven(
                f"layout.model is {ours.model!r}, that of the reference {theirs.model!r}: name the "
                "checkpoint as backends.checkpoint does, or give the same one to both"
            )
        return self._reference

    @property
    def measure(self) -> str:
        """The reference engine in a line, or why there is none."""
        return self._reference_maker.line if self._reference_maker is not None else self._absent

    def stop(self) -> None:
        """Close the plug-in; whoever asks for the desk next has it made again."""
        if self._desk is not None:
            desk, self._desk = self._desk, None
            desk.close()

    def renew(self) -> D:
        """Close the plug-in and make it again: the new desk."""
        self.stop()
        return self.desk

    def tidy(self, *, broken: bool) -> None:
        """As `Bench.tidy`."""
        if broken:
            self.renew()
        for kept in (self._desk, self._reference):
            if kept is not None:
                kept.clear()

    def close(self) -> None:
        """Give everything back."""
        self.stop()
        if self._reference is not None:
            self._reference.close()
        self._reference = None

    # ---- what is asked

    @property
    def info(self) -> BackendInfo:
        """What the plug-in states."""
        return self.desk.info

    @property
    def judged(self) -> Sampling:
        """As `judging`."""
        return judging(self.info)

    def prompts(self, count: int = 6, longest: int = LONGEST_TOKENS) -> list[list[int]]:
        """Seeded prompts of lengths around the edges of blocks, all of which fit at once."""
        info = self.info
        size = info.layout.block_tokens
        room = min(info.context_tokens, info.most_blocks * size // (2 * count)) - 2 * STEPS
        most = max(1, min(longest, room))
        wanted = [2 * size + 3, size, 1, size + 1, most, size - 1, 3 * size, 2, 5]
        dice = np.random.default_rng(count)
        lengths = [max(1, min(most, wanted[it % len(wanted)])) for it in range(count)]
        return [dice.integers(0, info.vocabulary, length).tolist() for length in lengths]
