"""The bench for stepped backends: rows, and KV that goes from one desk to another."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import msgspec
import numpy as np

from backends.api import Sampled, Sampling, Sequence
from backends.testing.bench import DeskBench
from backends.testing.carrying import carry, convertible
from backends.testing.desk import PATIENCE_SECONDS, Desk, Line
from backends.testing.form import Broken
from backends.testing.making import Maker


class SteppedBench(DeskBench[Desk]):
    """A call of the plug-in that takes longer than `patience` seconds counts as hung."""

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
        super().__init__(maker, reference, absent, made=made)
        self._patience = patience
        self._others: list[Desk] = []

    def place(self, backend: Any) -> Desk:
        """As `DeskBench.place`."""
        return Desk(backend, patience=self._patience)

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

    def tidy(self, *, broken: bool) -> None:
        """As `Bench.tidy`."""
        others, self._others = self._others, []
        for desk in others:
            desk.close()
        super().tidy(broken=broken)

    def close(self) -> None:
        """Give everything back."""
        self.tidy(broken=False)
        super().close()

    # ---- what is asked

    goes_on = True
    """As `Chooser.goes_on`."""

    @property
    def greedy(self) -> Sampling:
        """As `judged`, without log probabilities."""
        return msgspec.structs.replace(self.judged, logprobs=None)

    def line(self, prompt: Items[int]) -> Line:
        """A prompt to be continued as `judged` says."""
        return Line(prompt, self.judged)

    def choose(
        self,
        sampling: Sampling,
        prompt: Items[int],
        generated: Items[int] = (),
        seeds: Items[int] = (0,),
    ) -> list[Sampled]:
        """As `Chooser.choose`: one row, with a sequence for each seed."""
        line = Line(prompt, sampling)
        line.generated.extend(generated)
        row = self.desk.row(line, 0, len(line.tokens))
        sequences = tuple(
            Sequence(prompt=list(prompt), generated=list(generated), sampling=sampling, seed=seed)
            for seed in seeds
        )
        (output,) = self.desk.step([msgspec.structs.replace(row, sequences=sequences)])
        self.desk.release(line)
        return list(output.sampled)

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
