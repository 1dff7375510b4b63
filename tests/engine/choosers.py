"""Engines with a model that choose tokens otherwise, or say otherwise how likely they were."""

from __future__ import annotations

from typing import Any

import msgspec

from backends.api import DecodeJob, Logprob, Output, PrefillJob, Row, Sampled, Sampling
from tests.conformance.deafness import DEAF
from tests.engine.real import RealEngine
from tests.engine.small import Work

replace = msgspec.structs.replace
CHOOSERS: dict[type[RealEngine], str] = {}


class Rereads(RealEngine):
    """Reads the sampling parameters otherwise."""

    def _work(self, job: PrefillJob | DecodeJob) -> Work:
        work = super()._work(job)
        work.sequences = tuple(
            replace(it, sampling=self.read(it.sampling, job)) for it in work.sequences
        )
        return work

    def read(self, wanted: Sampling, job: PrefillJob | DecodeJob) -> Sampling:
        return wanted


class Retells(RealEngine):
    """Tells other log probabilities than it has."""

    def _deliver(self, rows: list[tuple[Work, Row]], outputs: list[Output]) -> None:
        super()._deliver(
            rows,
            [
                self.tell(output, work.sequences[0].sampling if work.sequences else Sampling())
                for (work, _), output in zip(rows, outputs, strict=True)
            ],
        )

    def tell(self, output: Output, wanted: Sampling) -> Output:
        sampled = (
            Sampled(it.token, it.logprob and self.told(it.logprob, wanted)) for it in output.sampled
        )
        return Output(tuple(sampled), output.prompt_logprobs)

    def told(self, known: Logprob, wanted: Sampling) -> Logprob:
        return known


def deaf(promise: str, **changes: Any) -> None:
    """A mutant that takes no notice of some parameters."""

    def read(self: Any, wanted: Sampling, _job: object) -> Sampling:
        return replace(wanted, **changes)

    name = "DeafTo" + "".join(it.title().replace("_", "") for it in changes)
    CHOOSERS[type(name, (Rereads,), {"read": read})] = promise


for promise, changes in DEAF.items():
    deaf(promise, **changes)


class FirstTokensAreGreedy(Rereads):
    def read(self, wanted: Sampling, job: PrefillJob | DecodeJob) -> Sampling:
        return replace(wanted, temperature=0.0) if isinstance(job, PrefillJob) else wanted


class TwiceTheTemperature(Rereads):
    def read(self, wanted: Sampling, job: PrefillJob | DecodeJob) -> Sampling:
        return replace(wanted, temperature=2 * wanted.temperature)


class ListsThemWorstFirst(Retells):
    def told(self, known: Logprob, wanted: Sampling) -> Logprob:
        return Logprob(known.token, known.logprob, known.top[::-1])


class SaysHowLikelyItWasToBeDrawn(Retells):
    def told(self, known: Logprob, wanted: Sampling) -> Logprob:
        heat = wanted.temperature or 1.0
        top = tuple((token, value / heat) for token, value in known.top)
        return Logprob(known.token, known.logprob / heat, top)


class CountsInBits(Retells):
    def told(self, known: Logprob, wanted: Sampling) -> Logprob:
        top = tuple((token, value / 0.6931) for token, value in known.top)
        return Logprob(known.token, known.logprob / 0.6931, top)


class ScoresTheTokenBefore(RealEngine):
    def _prefilled(self, work: Work, output: Output) -> None:
        values = [it.logprob for it in work.scores]
        shifted = zip(work.scores, values[-1:] + values[:-1], strict=True)
        work.scores = [Logprob(it.token, value, it.top) for it, value in shifted]
        super()._prefilled(work, output)


class EndsAtWhatItIsToIgnore(RealEngine):
    def _deliver(self, rows: list[tuple[Work, Row]], outputs: list[Output]) -> None:
        super()._deliver(rows, outputs)
        for work, _ in rows:
            if work.decodes and work in self._active and work.tokens[-1] in self.info.end_tokens:
                self._finish(work)


CHOOSERS |= {
    EndsAtWhatItIsToIgnore: "it_ends_only_where_it_may",
    FirstTokensAreGreedy: "temperature_is_honoured",
    TwiceTheTemperature: "temperature_is_honoured",
    ListsThemWorstFirst: "logprobs_are_honoured",
    SaysHowLikelyItWasToBeDrawn: "logprobs_are_honoured",
    CountsInBits: "logprobs_agree_with_the_reference",
    ScoresTheTokenBefore: "prompt_logprobs_agree_with_the_reference",
}
