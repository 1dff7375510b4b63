"""Engines that each break one promise, and the promise that finds them out.

A mutant is `SmallEngine` with a few lines changed, as somebody might write them by mistake. What it
does wrong it does whether its thread or the kit's is the faster: it takes its time where the kit
must find it at work, and waits for what the kit does where it must come after that.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import numpy as np

from backends.api import DecodeJob, Output, PrefillJob, Row, Sampled
from tests.engine.small import SmallEngine, Work

PATIENCE_SECONDS = 10.0
WATCHED_SECONDS = 0.5


class Slow(SmallEngine):
    """So slow that a long text is not at its end before the kit wants no more of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, step_seconds=0.02)


class ForgetsTheLastPosition(SmallEngine):
    def _copy(self, source: Any, froms: Any, target: Any, tos: Any, start: int, end: int) -> None:
        if target is self._arena:
            end -= 1
        super()._copy(source, froms, target, tos, start, end)


class LeavesOutAPartialBlock(SmallEngine):
    def _export(self, work: Work, job: PrefillJob, start: int) -> None:
        size = self.info.layout.block_tokens
        done, work.done = work.done, work.done - work.done % size
        super()._export(work, job, start)
        work.done = done


class TellsReadyBeforeItCopies(SmallEngine):
    def _export(self, work: Work, job: PrefillJob, start: int) -> None:
        for layer in range(self.info.layout.layers):
            self.events.ready(work.name, start, work.done, layer)
        self._copy(self._memory, work.blocks, self._arena, job.blocks, start, work.done)


class ExportsWithoutBeingAsked(SmallEngine):
    def _export(self, work: Work, job: PrefillJob, start: int) -> None:
        if not job.blocks:
            blocks = range(len(work.blocks))
            self._copy(self._memory, work.blocks, self._arena, blocks, start, work.done)
        super()._export(work, job, start)


class WritesToTheNextBlock(SmallEngine):
    def _export(self, work: Work, job: PrefillJob, start: int) -> None:
        super()._export(work, job, start)
        self._arena[(max(job.blocks, default=0) + 1) % len(self._arena)] = 0


class ExportsAfterItSaidPrefilled(SmallEngine):
    def _prefilled(self, work: Work, output: Output) -> None:
        exported = self._arena.copy()
        super()._prefilled(work, output)
        if isinstance(work.job, PrefillJob) and work.job.blocks:
            self._until_others_write(exported)
            self._copy(self._memory, work.blocks, self._arena, work.job.blocks, 0, work.done)

    def _until_others_write(self, exported: Any) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while np.array_equal(self._arena, exported) and time.monotonic() < deadline:
            time.sleep(0.001)


class StopsOneTokenShort(SmallEngine):
    def _work(self, job: PrefillJob | DecodeJob) -> Work:
        if isinstance(job, DecodeJob):
            job = msgspec.structs.replace(job, max_tokens=job.max_tokens - 1)
        return super()._work(job)


class KeepsTheStopToken(SmallEngine):
    """Ends at one, as it may, but does not tell it."""

    def _deliver(self, rows: list[tuple[Work, Row]], outputs: list[Output]) -> None:
        told = []
        for (work, row), output in zip(rows, outputs, strict=True):
            stops = work.sequences[0].sampling.stop_token_ids if work.sequences else ()
            if work.decodes and any(it.token in stops for it in output.sampled):
                self._finish(work)
            else:
                told.append(((work, row), output))
        super()._deliver([it for it, _ in told], [output for _, output in told])


class ImportsOnePositionAside(SmallEngine):
    def _import(self, work: Work, job: DecodeJob) -> None:
        size = self.info.layout.block_tokens
        work.done = job.imported_tokens
        for position in range(1, work.done):
            block, offset = divmod(position, size)
            source, before = divmod(position - 1, size)
            target = work.blocks[block]
            self._memory[target, offset] = self._arena[job.blocks[source], before]
        self.events.imported(work.name)


class SaysImportedBeforeItCopies(SmallEngine):
    def _import(self, work: Work, job: DecodeJob) -> None:
        self.events.imported(work.name)
        work.done = job.imported_tokens
        self._copy(self._arena, job.blocks, self._memory, work.blocks, 0, work.done)


class NeverSaysImported(SmallEngine):
    def start(self, events: Any) -> None:
        class Deaf:
            def __getattr__(self, name: str) -> Any:
                return (lambda _: None) if name == "imported" else getattr(events, name)

        super().start(Deaf())


class ForgetsWhatWasGenerated(SmallEngine):
    def _work(self, job: PrefillJob | DecodeJob) -> Work:
        if isinstance(job, DecodeJob) and not job.blocks:
            sequence = msgspec.structs.replace(job.sequence, generated=[])
            job = msgspec.structs.replace(job, sequence=sequence)
        return super()._work(job)


class GivesAllSequencesOneToken(SmallEngine):
    def _deliver(self, rows: list[tuple[Work, Row]], outputs: list[Output]) -> None:
        same = [Output(it.sampled[:1] * len(it.sampled), it.prompt_logprobs) for it in outputs]
        super()._deliver(rows, same)


class IgnoresTheSeed(SmallEngine):
    def _work(self, job: PrefillJob | DecodeJob) -> Work:
        work = super()._work(job)
        work.sequences = tuple(msgspec.structs.replace(it, seed=0) for it in work.sequences)
        return work


class MixesUpItsBatch(Slow):
    def _deliver(self, rows: list[tuple[Work, Row]], outputs: list[Output]) -> None:
        if len(rows) > 1 and all(
            work.decodes and output.sampled for (work, _), output in zip(rows, outputs, strict=True)
        ):
            outputs = [*outputs[1:], outputs[0]]
        super()._deliver(rows, outputs)


class ScoresOneTokenTooFew(SmallEngine):
    def _prefilled(self, work: Work, output: Output) -> None:
        work.scores = work.scores[1:]
        super()._prefilled(work, output)


class FindsKVUnderAnySalt(SmallEngine):
    def _prefilled(self, work: Work, output: Output) -> None:
        seen = self.__dict__.setdefault("seen", set())
        tokens = tuple(work.tokens)
        cached = len(tokens) if tokens in seen else 0
        seen.add(tokens)
        scores = tuple(work.scores)
        self.events.prefilled(work.name, Output(output.sampled, scores), cached)


class NeverEndsWhatWasAborted(Slow):
    def _on_abort(self, name: str) -> None:
        self._waiting = [it for it in self._waiting if it.name != name]
        for work in [it for it in self._active if it.name == name]:
            self._active.remove(work)
            self._release(work)


class EndsBeforeItsMemoryIsFree(SmallEngine):
    def _finish(self, work: Work) -> None:
        self._active.remove(work)
        self.events.ended(work.name)
        self._release(work)


class EndsTwice(SmallEngine):
    def _on_abort(self, name: str) -> None:
        known = [it for it in (*self._waiting, *self._active) if it.name == name]
        super()._on_abort(name)
        if not known:
            self.events.ended(name)


class TellsATokenAfterTheEnd(SmallEngine):
    def _finish(self, work: Work) -> None:
        super()._finish(work)
        if work.decodes:
            self.events.decoded([(work.name, Sampled(1))])


class KeepsTheMemoryOfWhatWasAborted(Slow):
    def _reap(self) -> None:
        now = time.monotonic()
        for work in [it for it in self._active if it.free_at is not None and it.free_at <= now]:
            work.blocks = []
            self._finish(work)


class EndsWhatDoesNotFit(Slow):
    def _admit(self) -> None:
        super()._admit()
        for work in [*self._waiting]:
            self._waiting.remove(work)
            self.events.ended(work.name)


class FailsForAnotherReasonWhenItIsFull(Slow):
    def _admit(self) -> None:
        super()._admit()
        for work in [*self._waiting]:
            self._waiting.remove(work)
            self.events.failed(work.name, RuntimeError("CUDA out of memory"))
            self.events.ended(work.name)


class WaitsForItsScheduler(SmallEngine):
    def decode(self, job: DecodeJob) -> None:
        super().decode(job)
        time.sleep(0.1)


class WritesAfterItWasClosed(SmallEngine):
    def close(self) -> None:
        super().close()
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        deadline = time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < deadline:
            self.pool[:64] = 1
            time.sleep(0.001)


class HangsWhenClosedWithJobs(Slow):
    """Waits for all that it was given to come to its end."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._given = self._over = 0

    def _take(self, job: PrefillJob | DecodeJob, tokens: int) -> None:
        super()._take(job, tokens)
        self._given += 1

    def _finish(self, work: Work) -> None:
        super()._finish(work)
        self._over += 1

    def close(self) -> None:
        while self._over < self._given:
            time.sleep(0.01)
        super().close()


class StatesAnotherOrderOfAxes(SmallEngine):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        lie = "block layer kv token head dim"
        layout = msgspec.structs.replace(self.info.layout, axes=lie)
        self.info = msgspec.structs.replace(self.info, layout=layout)


class ReadsHeadsInAnotherOrder(SmallEngine):
    def _import(self, work: Work, job: DecodeJob) -> None:
        super()._import(work, job)
        self._memory[work.blocks] = self._memory[work.blocks][:, :, :, :, ::-1]


class HasTooSmallAnArena(SmallEngine):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "arena_tokens": options["context_tokens"] - 16})


MUTANTS: dict[type[SmallEngine], str] = {
    HasTooSmallAnArena: "its_statements_make_sense",
    ForgetsTheLastPosition: "a_prefix_is_exported_whole",
    LeavesOutAPartialBlock: "a_prefix_is_exported_whole",
    ExportsWithoutBeingAsked: "without_blocks_nothing_is_exported",
    TellsReadyBeforeItCopies: "what_is_ready_is_final",
    WritesToTheNextBlock: "nothing_else_of_the_arena_is_touched",
    ExportsAfterItSaidPrefilled: "the_arena_is_left_alone_after_the_prefix",
    StopsOneTokenShort: "every_token_is_told",
    KeepsTheStopToken: "it_ends_only_where_it_may",
    ImportsOnePositionAside: "decoding_after_a_handoff_equals_decoding_in_place",
    NeverSaysImported: "decoding_after_a_handoff_equals_decoding_in_place",
    ForgetsWhatWasGenerated: "a_continued_sequence_is_continued",
    GivesAllSequencesOneToken: "sequences_share_a_prefix",
    SaysImportedBeforeItCopies: "the_arena_is_free_once_imported",
    StatesAnotherOrderOfAxes: "the_reference_continues_what_it_exports",
    ReadsHeadsInAnotherOrder: "what_the_reference_exports_is_continued",
    MixesUpItsBatch: "jobs_do_not_change_each_other",
    IgnoresTheSeed: "a_seed_gives_its_text_again",
    ScoresOneTokenTooFew: "prompt_logprobs_are_given_as_declared",
    FindsKVUnderAnySalt: "nothing_is_found_under_another_salt",
    NeverEndsWhatWasAborted: "an_aborted_job_ends_once_and_holds_nothing",
    EndsBeforeItsMemoryIsFree: "an_aborted_job_ends_once_and_holds_nothing",
    EndsTwice: "an_abort_of_what_is_over_has_no_effect",
    TellsATokenAfterTheEnd: "nothing_is_said_after_the_end",
    EndsWhatDoesNotFit: "more_than_fits_waits_or_is_refused",
    FailsForAnotherReasonWhenItIsFull: "more_than_fits_waits_or_is_refused",
    KeepsTheMemoryOfWhatWasAborted: "memory_comes_back",
    WaitsForItsScheduler: "calls_return_at_once",
    WritesAfterItWasClosed: "it_can_be_closed_with_jobs_open",
    HangsWhenClosedWithJobs: "it_can_be_closed_with_jobs_open",
}
