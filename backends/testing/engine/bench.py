"""The bench for engines: the plug-in, a stepped reference for its model, and prompts."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, Literal

import numpy as np

from backends.api import Sampled, Sampling
from backends.errors import BackendError
from backends.testing.alike import EXACT, Bounds, bounds_of, judging, require_alike
from backends.testing.bench import LONGEST_TOKENS, STEPS, SteppedBench
from backends.testing.desk import PATIENCE_SECONDS, Desk
from backends.testing.engine.desk import EngineDesk
from backends.testing.form import Broken, Unproven, described
from backends.testing.making import Maker


class EngineBench:
    """Makes the engine and the reference as often as it takes, and closes them.

    `made` is an engine that was made already; `absent` says why there is no reference.
    """

    def __init__(
        self,
        maker: Maker,
        reference: Maker | None = None,
        absent: str = "none",
        *,
        made: Any = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Nothing is started yet."""
        self.maker = maker
        self._absent = absent
        self._patience = patience
        self._measure = SteppedBench(reference) if reference is not None else None
        self._made = made
        self._desk: EngineDesk | None = None

    @property
    def desk(self) -> EngineDesk:
        """The engine with its options: the same one from promise to promise."""
        if self._desk is None:
            backend, self._made = self._made or self.maker.make(), None
            self._desk = EngineDesk(backend, patience=self._patience)
        return self._desk

    @property
    def reference(self) -> Desk:
        """A stepped backend for the same model.

        Raises:
            Unproven: there is none.
        """
        if self._measure is None:
            raise Unproven(f"there is no reference engine: {self._absent}")
        try:
            theirs, ours = self._measure.desk, self.desk.layout
        except (BackendError, ImportError) as error:
            self._measure, self._absent = None, described(error)
            raise Unproven(f"the reference engine cannot be used: {self._absent}") from error
        if ours.model != theirs.layout.model:
            raise Unproven(
                f"layout.model is {ours.model!r}, that of the reference {theirs.layout.model!r}: "
                "name the checkpoint as backends.checkpoint does, or give the same one to both"
            )
        return theirs

    @property
    def measure(self) -> str:
        """The reference engine in a line, or why there is none."""
        return self._measure.maker.line if self._measure is not None else self._absent

    def stop(self) -> None:
        """Close the engine; whoever asks for the desk next has it made again."""
        if self._desk is not None:
            desk, self._desk = self._desk, None
            desk.close()

    def renew(self) -> EngineDesk:
        """Close the engine and make it again: the new desk."""
        self.stop()
        return self.desk

    def tidy(self, *, broken: bool) -> None:
        """As `Bench.tidy`."""
        if broken:
            self.renew()
        if self._desk is not None:
            self._desk.clear()
        if self._measure is not None:
            self._measure.tidy(broken=False)

    def close(self) -> None:
        """Give everything back."""
        if self._desk is not None:
            self._desk.close()
        if self._measure is not None:
            self._measure.close()
        self._desk = None

    # ---- what is asked

    def needs(self, *phases: Literal["prefill", "decode"]) -> EngineDesk:
        """The desk of an engine that does all of these.

        Raises:
            Unproven: it does not.
        """
        lacking = [phase for phase in phases if phase not in self.desk.info.phases]
        if lacking:
            raise Unproven(f"info.phases: it does not {lacking[0]}")
        return self.desk

    @property
    def judged(self) -> Sampling:
        """As `judging`."""
        return judging(self.desk.info)

    @property
    def drawn(self) -> Sampling:
        """Drawn at random, as far as it can be asked for."""
        return Sampling(ignore_eos="ignore_eos" in self.desk.info.sampling)

    @property
    def bounds(self) -> Bounds:
        """How alike the engine must be to itself."""
        info = self.desk.info
        return EXACT if info.continuation == "exact" else bounds_of(info.layout)

    def prompts(self, count: int = 6, longest: int = LONGEST_TOKENS) -> list[list[int]]:
        """Seeded prompts of lengths around the edges of blocks."""
        info = self.desk.info
        size = info.layout.block_tokens
        capacity = min(info.pool_blocks, info.engine_blocks) * size
        most = max(1, min(longest, info.context_tokens, capacity // (2 * count)) - 2 * STEPS)
        wanted = [2 * size + 3, size, 1, size + 1, most, size - 1, 3 * size, 2, 5]
        dice = np.random.default_rng(count)
        lengths = [max(1, min(most, wanted[it % len(wanted)])) for it in range(count)]
        return [dice.integers(0, info.vocabulary, length).tolist() for length in lengths]


def require_same_texts(
    texts: Items[tuple[Items[Sampled], Items[Sampled]]], bounds: Bounds, otherwise: str
) -> None:
    """Hold pairs of texts, which went their own ways, to `bounds`, as far as they went together.

    Beyond the first token in which two differ they have another past, and are not compared.

    Raises:
        Broken: they are further apart; `otherwise` says what to fix.
    """
    ours: list[Sampled] = []
    theirs: list[Sampled] = []
    for one, other in texts:
        if len(one) != len(other):
            raise Broken(f"{otherwise}: {len(one)} tokens where there are {len(other)}")
        pairs = enumerate(zip(one, other, strict=True))
        unlike = next((at for at, (a, b) in pairs if a.token != b.token), len(one))
        ours += one[: unlike + 1]
        theirs += other[: unlike + 1]
    require_alike(ours, theirs, bounds, otherwise)
