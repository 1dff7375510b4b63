"""The bench for stepped backends: the plug-in, a reference engine for its model, and prompts."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import msgspec
import numpy as np

from backends.api import Sampling
from backends.errors import BackendError
from backends.testing.alike import judging
from backends.testing.carrying import carry, convertible
from backends.testing.desk import PATIENCE_SECONDS, Desk, Line
from backends.testing.form import Broken, Unproven, described
from backends.testing.making import Maker

STEPS = 8
"""Tokens that a prompt is continued by, in most promises."""

LONGEST_TOKENS = 160
MODEST = {"pool_tokens": 2048, "context_tokens": 512}
"""What the plug-in gets where it takes that and nothing else was said: the kit needs no more."""


class SteppedBench:
    """Makes the plug-in and the reference as often as it takes, and closes them.

    `absent` says why there is no reference, where there is none. A call of the plug-in that takes
    longer than `patience` seconds counts as hung.
    """

    def __init__(
        self,
        maker: Maker,
        reference: Maker | None = None,
        absent: str = "none was named",
        patience: float = PATIENCE_SECONDS,
        *,
        made: Any = None,
    ) -> None:
        """Nothing is made yet, unless one is `made` already."""
        self._patience = patience
        self._made = made
        self.maker = maker
        self.absent = absent
        self._reference_maker = reference
        self._desk: Desk | None = None
        self._reference: Desk | None = None
        self._others: list[Desk] = []

    # ---- desks

    @property
    def desk(self) -> Desk:
        """The plug-in with its options, all blocks free: the same one from promise to promise."""
        if self._desk is None:
            backend, self._made = self._made or self.maker.make(), None
            self._desk = Desk(backend, patience=self._patience)
        return self._desk

    def another(self, **changes: Any) -> Desk:
        """One more, made anew, until the promise is settled. Two of them may be too large.

        Raises:
            BackendMisconfigured: it refuses these options.
        """
        desk = Desk(self.maker.make(**changes), seed=len(self._others) + 2)
        self._others.append(desk)
        return desk

    def let_go(self, desk: Desk) -> None:
        """Close one of `another` before its time."""
        self._others.remove(desk)
        desk.close()

    @property
    def reference(self) -> Desk:
        """The engine that the plug-in is measured by.

        Raises:
            Unproven: there is none, or it is not for the same model.
        """
        if self._reference is None:
            if self._reference_maker is None:
                raise Unproven(f"there is no reference engine: {self.absent}")
            try:
                self._reference = Desk(self._reference_maker.make(), seed=1)
            except (BackendError, ImportError) as error:
                self._reference_maker, self.absent = None, described(error)
                raise Unproven(f"the reference engine cannot be used: {self.absent}") from error
        ours, theirs = self.desk.layout, self._reference.layout
        if ours.model != theirs.model:
            raise Unproven(
                f"layout.model is {ours.model!r}, that of the reference {theirs.model!r}: name the "
                "checkpoint as backends.checkpoint does, or give the same one to both"
            )
        return self._reference

    @property
    def measure(self) -> str:
        """The reference engine in a line, or why there is none."""
        return self._reference_maker.line if self._reference_maker is not None else self.absent

    def renew(self) -> Desk:
        """Close the plug-in and make it again: the new desk."""
        if self._desk is not None:
            desk, self._desk = self._desk, None
            desk.close()
        return self.desk

    def tidy(self, *, broken: bool) -> None:
        """As `Bench.tidy`."""
        others, self._others = self._others, []
        for desk in others:
            desk.close()
        if broken:
            self.renew()
        for kept in (self._desk, self._reference):
            if kept is not None:
                kept.clear()

    def close(self) -> None:
        """Give everything back."""
        self.tidy(broken=False)
        for desk in (self._desk, self._reference):
            if desk is not None:
                desk.close()
        self._desk = self._reference = None

    # ---- what is asked

    @property
    def judged(self) -> Sampling:
        """As `judging`."""
        return judging(self.desk.info)

    @property
    def greedy(self) -> Sampling:
        """As `judged`, without log probabilities."""
        return msgspec.structs.replace(self.judged, logprobs=None)

    def prompts(self, count: int = 6, longest: int = LONGEST_TOKENS) -> list[list[int]]:
        """Seeded prompts of lengths around the edges of blocks, all of which fit at once."""
        info = self.desk.info
        size = info.layout.block_tokens
        room = min(info.context_tokens, info.pool_blocks * size // (2 * count)) - 2 * STEPS
        most = max(1, min(longest, room))
        wanted = [2 * size + 3, size, 1, size + 1, most, size - 1, 3 * size, 2, 5]
        dice = np.random.default_rng(count)
        lengths = [max(1, min(most, wanted[it % len(wanted)])) for it in range(count)]
        return [dice.integers(0, info.vocabulary, length).tolist() for length in lengths]

    def line(self, prompt: Items[int]) -> Line:
        """A prompt to be continued as `judged` says."""
        return Line(prompt, self.judged)

    # ---- handoffs

    def hand_over(self, source: Desk, line: Line, target: Desk) -> Line:
        """Carry the KV of a prefilled line to another desk, where the line goes on.

        Its blocks there have held the KV of something else before.

        Raises:
            Broken: the two layouts cannot be converted, or the pool changed meanwhile.
        """
        reason = convertible(source.backend, target.backend)
        if reason:
            raise Broken(f"info.layout: KV cannot be handed over: {reason}")
        arrived = Line(line.sequence.prompt, line.sequence.sampling, line.sequence.seed)
        arrived.generated.extend(line.generated)
        length = len(line.tokens) - 1
        self._soil(target, length)
        target.cover(arrived, length)
        carry(source.backend, line.blocks, target.backend, arrived.blocks, length)
        target.ingest(arrived.blocks)
        return arrived

    def _soil(self, desk: Desk, length: int) -> None:
        """Compute something else in the blocks that are given out next."""
        dice = np.random.default_rng(length)
        other = Line(dice.integers(0, desk.info.vocabulary, length), self.judged)
        desk.prefill(other)
        desk.release(other)
