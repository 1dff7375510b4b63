"""Plug-ins that read parameters and seeds otherwise."""

from __future__ import annotations

from typing import Any

from backends.api import Sampling, Sequence
from tests.conformance.deafness import DEAF
from tests.conformance.mutants.sound import Sound, breaks, replace


class Rewrites(Sound):
    """Reads the sampling parameters otherwise."""

    def step(self, batch, ready):
        return super().step(
            [replace(row, sequences=tuple(map(self.reread, row.sequences))) for row in batch], ready
        )

    def reread(self, sequence):
        wanted = self.sampling(sequence.sampling)
        prompt, generated = sequence.prompt, sequence.generated
        return Sequence(prompt=prompt, generated=generated, sampling=wanted, seed=sequence.seed)

    def sampling(self, wanted: Sampling) -> Sampling:
        return wanted


def deaf(promise: str, **changes: Any) -> None:
    """A mutant that takes no notice of some parameters."""

    def sampling(self: Any, wanted: Sampling) -> Sampling:
        return replace(wanted, **changes)

    name = f"DeafTo{'And'.join(it.title().replace('_', '') for it in changes)}"
    mutant = breaks(promise)(type(name, (Rewrites,), {"sampling": sampling}))
    globals()[name] = mutant


for promise, changes in DEAF.items():
    deaf(promise, **changes)


@breaks("temperature_is_honoured")
class TwiceTheTemperature(Rewrites):
    def sampling(self, wanted):
        return replace(wanted, temperature=wanted.temperature * 2)


@breaks("frequency_penalty_is_honoured")
class CountsOnce(Rewrites):
    def sampling(self, wanted):
        both = wanted.presence_penalty + wanted.frequency_penalty
        return replace(wanted, presence_penalty=both, frequency_penalty=0.0)


@breaks("presence_penalty_is_honoured")
class PenalisesThePrompt(Rewrites):
    def reread(self, sequence):
        wanted = sequence.sampling
        if not wanted.presence_penalty:
            return sequence
        everything = [*sequence.prompt, *sequence.generated]
        return Sequence(prompt=[], generated=everything, sampling=wanted, seed=sequence.seed)


@breaks("seeds_repeat_and_differ")
class DrawsByTurn(Rewrites):
    turn = 0

    def reread(self, sequence):
        self.turn += 1
        return Sequence(
            prompt=sequence.prompt,
            generated=sequence.generated,
            sampling=sequence.sampling,
            seed=sequence.seed + self.turn,
        )


@breaks("positions_draw_anew")
class DrawsByTheSeedAlone(Rewrites):
    def reread(self, sequence):
        everything = [*sequence.prompt, *sequence.generated][-4:]
        return Sequence(
            prompt=everything, generated=[], sampling=sequence.sampling, seed=sequence.seed
        )


@breaks("a_seeded_text_goes_on_elsewhere")
class DrawsByHowOftenItDrew(Rewrites):
    def begin(self):
        self._drawn: dict[int, list[Any]] = {}

    def reread(self, sequence):
        drawn = self._drawn.setdefault(id(sequence), [])
        drawn.append(sequence)  # so that its id stays its own
        return Sequence(
            prompt=sequence.prompt,
            generated=sequence.generated,
            sampling=sequence.sampling,
            seed=sequence.seed * 1000 + len(drawn),
        )
