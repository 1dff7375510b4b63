"""The bench for engines: jobs, and how alike their texts are."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, Literal

from backends.api import Sampled, Sampling
from backends.testing.alike import Bounds, own_bounds, require_alike
from backends.testing.bench import DeskBench
from backends.testing.desk import PATIENCE_SECONDS
from backends.testing.engine.desk import EngineDesk
from backends.testing.form import Broken, Unproven
from backends.testing.making import Maker

Phase = Literal["prefill", "decode"]

WAVE = 16
"""So many jobs are given at once where there are many to give."""


class EngineBench(DeskBench[EngineDesk]):
    """What the engine does not say within `patience` seconds counts as never said."""

    def __init__(
        self,
        maker: Maker,
        reference: Maker | None = None,
        absent: str = "none was named",
        *,
        made: Any = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Nothing is started yet."""
        super().__init__(maker, reference, absent, made=made)
        self._patience = patience
        self.chooses_in: Phase = "decode"

    def place(self, backend: Any) -> EngineDesk:
        """As `DeskBench.place`."""
        return EngineDesk(backend, patience=self._patience)

    # ---- what is asked

    def needs(self, *phases: Phase) -> EngineDesk:
        """The desk of an engine that does all of these.

        Raises:
            Unproven: it does not.
        """
        lacking = [phase for phase in phases if phase not in self.desk.info.phases]
        if lacking:
            raise Unproven(f"info.phases: it does not {lacking[0]}")
        return self.desk

    @property
    def drawn(self) -> Sampling:
        """Drawn at random, as far as it can be asked for."""
        return Sampling(ignore_eos="ignore_eos" in self.desk.info.sampling)

    @property
    def bounds(self) -> Bounds:
        """How alike the engine must be to itself."""
        return own_bounds(self.info)

    @property
    def goes_on(self) -> bool:
        """As `Chooser.goes_on`."""
        return self.chooses_in == "decode"

    def choose(
        self,
        sampling: Sampling,
        prompt: Items[int],
        generated: Items[int] = (),
        seeds: Items[int] = (0,),
    ) -> list[Sampled]:
        """As `Chooser.choose`, by jobs of the phase `chooses_in`."""
        if generated and not self.goes_on:
            raise Unproven("a prefix has no generated tokens, and it does not decode")
        each = self.info.layout.blocks_for(len(prompt) + len(generated) + 1)
        wave = max(1, min(WAVE, self.info.engine_blocks // (2 * each)))
        found: list[Sampled] = []
        for start in range(0, len(seeds), wave):
            asked = [
                self.desk.decode(prompt, generated, sampling, seed=seed)
                if self.goes_on
                else self.desk.prefill(prompt, sampling, seeds=(seed,), export=False)
                for seed in seeds[start : start + wave]
            ]
            found += [self.desk.tokens(it, 1)[0] for it in asked]
        return found


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
