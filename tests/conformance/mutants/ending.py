"""Plug-ins that do not stop, or do not start, as they should."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from typing import Any, ClassVar

from backends.api import Sampled, StepFailed
from backends.emulation.synthetic import SyntheticBackend
from tests.conformance.mutants.placing import DeafToIngest
from tests.conformance.mutants.sound import Sound, breaks, replace


@breaks("a_step_that_fails_loses_no_more_than_itself")
class StaysBroken(Sound):
    broken = False

    def step(self, batch, ready):
        if self.broken:
            raise StepFailed("still broken")
        try:
            return super().step(batch, ready)
        except StepFailed:
            self.broken = True
            raise


@breaks("a_cancel_at_any_point_disturbs_nobody")
class GuardsTheVanished(Sound):
    """Refuses blocks of a prompt whose last chunk it has not seen."""

    def begin(self):
        self._guarded: set[int] = set()

    def step(self, batch, ready):
        for row in batch:
            if not row.start and self._guarded & set(row.blocks):
                raise StepFailed("a block is in use")
            change = self._guarded.difference_update if row.sequences else self._guarded.update
            change(row.blocks)
        return super().step(batch, ready)


@breaks("a_cancel_frees_every_block")
class GuardsTheVanishedInAWorker(GuardsTheVanished):
    pass


@breaks("made_again_it_computes_the_same")
class OtherEachTime(Sound):
    made: ClassVar[Any] = itertools.count()

    def begin(self):
        if next(self.made) % 2:
            self.change_weights()


@breaks("in_a_new_process_it_computes_the_same")
class OtherInEachProcess(SyntheticBackend):
    def step(self, batch, ready):
        if "pytest" in sys.modules:
            return super().step(batch, ready)
        return [replace(output, sampled=(Sampled(1),)) for output in super().step(batch, ready)]


@breaks("a_worker_whose_step_hangs_ends")
class LeavesAChild(SyntheticBackend):
    def __init__(self, **options):
        super().__init__(**options)
        self._child = subprocess.Popen(["sleep", "600"])

    def close(self):
        self._child.kill()
        self._child.wait()
        super().close()


@breaks("a_worker_continues_what_another_computed")
class DeafToIngestInAWorker(DeafToIngest):
    pass


@breaks("a_worker_continues_what_the_reference_computed")
class DeafToIngestBehindTheReference(DeafToIngest):
    pass


@breaks("a_worker_says_what_it_says")
class KeepsTables(Sound):
    """Takes a table that it has seen for one that does not grow."""

    def begin(self):
        self._tables: dict[int, Any] = {}

    def step(self, batch, ready):
        return super().step([replace(row, blocks=self._kept(row.blocks)) for row in batch], ready)

    def _kept(self, blocks: list[int]) -> list[int]:
        return self._tables.setdefault(id(blocks), (blocks, list(blocks)))[1]


@breaks("sequences_end_where_they_are_told")
class EndsByItself(Sound):
    def step(self, batch, ready):
        if any(len(it.generated) >= 6 for row in batch for it in row.sequences):
            raise StepFailed("the sequence has ended")
        return super().step(batch, ready)


@breaks("every_row_is_answered")
class Hangs(Sound):
    def step(self, batch, ready):
        if len(batch) > 1:
            threading.Event().wait()
        return super().step(batch, ready)
