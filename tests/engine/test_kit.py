"""The kit's list for engines: the small engine keeps it, each mutant breaks what it breaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from backends.emulation import EmulationBackend
from backends.emulation.synthetic import SyntheticBackend
from backends.testing import ENGINE, EngineBench, Hangs, Maker, conformance, examine
from backends.testing.choosing.asking import Chooser
from backends.testing.engine.choosing import in_each_phase
from tests.engine.choosers import CHOOSERS
from tests.engine.mutants import MUTANTS
from tests.engine.real import RealEngine
from tests.engine.small import SmallEngine
from tests.life.cluster import SHAPE
from transfer.warming import warm_up

SHAPES = {"layers": 3, "kv_heads": 2, "head_dim": 16}
SIZES = {"arena_tokens": 1024, "context_tokens": 512, "pool_tokens": 1024}
OPTIONS: dict[str, Any] = {**SHAPES, **SIZES, "prompt_logprobs": True}
REFERENCE: dict[str, Any] = {**SHAPE, "pool_tokens": 1024, "context_tokens": 512}
PROMISES = {promise.__name__: promise for promise in ENGINE}


REAL = {"arena_tokens": 1024, "prompt_logprobs": True}
OF_NUMBERS = set(CHOOSERS.values())
"""What is asked only of an engine whose tokens follow from logits."""


@contextmanager
def real_bench(kind: type[RealEngine], tiny: str) -> Iterator[EngineBench]:
    shared = {"model": tiny, "pool_tokens": 1024, "context_tokens": 512}
    exact = {"dtype": "float32", "kv_dtype": "float32", "threads": 1}
    made = EngineBench(
        Maker(kind.__name__, kind, {**shared, **REAL}),
        Maker("emulation", EmulationBackend, {**shared, **exact}),
    )
    try:
        yield made
    finally:
        made.close()


@contextmanager
def bench(kind: type[SmallEngine], patience: float = 20.0, **more: Any) -> Iterator[EngineBench]:
    warm_up()
    maker = Maker(kind.__name__, kind, {**OPTIONS, **more})
    reference = Maker("synthetic", SyntheticBackend, REFERENCE)
    made = EngineBench(maker, reference, patience=patience)
    try:
        yield made
    finally:
        made.close()


def test_an_engine_keeps_every_promise() -> None:
    with bench(SmallEngine, linger_seconds=0.005, chunk_tokens=20) as desk:
        verdicts = examine(ENGINE, desk)
    assert {it.promise: it.detail for it in verdicts if it.outcome == "broken"} == {}
    assert {it.promise for it in verdicts if it.outcome == "unproven"} <= OF_NUMBERS


def test_an_engine_with_a_model_keeps_every_promise_about_numbers(tiny: str) -> None:
    with real_bench(RealEngine, tiny) as desk:
        verdicts = examine([PROMISES[name] for name in sorted(OF_NUMBERS)], desk)
    assert {it.promise: it.detail for it in verdicts if it.outcome != "kept"} == {}


@pytest.mark.parametrize("mutant", CHOOSERS, ids=lambda it: it.__name__)
def test_who_chooses_or_tells_otherwise_breaks_its_promise(
    mutant: type[RealEngine], tiny: str
) -> None:
    with real_bench(mutant, tiny) as desk:
        (verdict,) = examine([PROMISES[CHOOSERS[mutant]]], desk)
    assert verdict.outcome == "broken", verdict
    assert len(verdict.detail) > 20, "it says what to fix"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_of_an_engine_that_does_half_the_other_half_is_not_asked(phase: str) -> None:
    with bench(SmallEngine, phases=(phase,)) as desk:
        verdicts = examine(ENGINE, desk)
    assert {it.promise: it.detail for it in verdicts if it.outcome == "broken"} == {}
    unproven = {it.promise for it in verdicts if it.outcome == "unproven"}
    assert "decoding_after_a_handoff_equals_decoding_in_place" in unproven
    assert len(unproven) <= len(ENGINE) // 2


def test_of_an_engine_that_hangs_where_it_chooses_nothing_more_is_asked() -> None:
    @in_each_phase
    def it_chooses(chooser: Chooser) -> None:
        """It says what it has chosen."""
        raise Hangs("token 1 was not said")

    with bench(SmallEngine) as desk:
        found = examine([it_chooses, PROMISES["every_token_is_told"]], desk)
    assert [it.outcome for it in found] == ["broken", "unproven"]
    assert "asked in decode jobs" in found[0].detail
    assert "it_chooses, where it hung" in found[1].detail


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda it: it.__name__)
def test_a_mutant_breaks_its_promise(mutant: type[SmallEngine]) -> None:
    with bench(mutant, patience=1.0) as desk:
        (verdict,) = examine([PROMISES[MUTANTS[mutant]]], desk)
    assert verdict.outcome == "broken"
    assert len(verdict.detail) > 20, "it says what to fix"


def test_every_promise_has_a_mutant() -> None:
    assert {*MUTANTS.values(), *CHOOSERS.values()} == PROMISES.keys()


def test_the_kit_knows_an_engine_by_what_it_states() -> None:
    name = f"{SmallEngine.__module__}:{SmallEngine.__name__}"
    report = conformance(name, OPTIONS, reference=("synthetic", REFERENCE))
    assert (report.contract, report.ok, len(report.verdicts)) == ("engine", True, len(ENGINE))


def test_a_reference_that_cannot_be_made_proves_nothing() -> None:
    made = EngineBench(
        Maker("small", SmallEngine, OPTIONS),
        Maker("synthetic", SyntheticBackend, {**REFERENCE, "block_tokens": 0}),
    )
    try:
        (verdict,) = examine([PROMISES["the_reference_continues_what_it_exports"]], made)
    finally:
        made.close()
    assert (verdict.outcome, "block_tokens" in verdict.detail) == ("unproven", True)
