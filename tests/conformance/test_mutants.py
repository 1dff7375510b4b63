"""The kit is kept honest: sound plug-ins keep every promise, and each broken one breaks its own."""

import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.testing import STEPPED, Maker, SteppedBench, examine
from backends.testing.alike import NOT_EXACT
from tests.conformance.mutants import MUTANTS, Apart, Sound
from tests.conformance.mutants.ending import Hangs
from tests.conformance.mutants.stating import NotQuiteExact, OtherAxes, OtherPairing
from tests.conformance.pieces import Pieces

PROMISES = {promise.__name__: promise for promise in STEPPED}
SHAPE = {"layers": 3, "head_dim": 16, "pool_tokens": 2048, "context_tokens": 256, "verify_kv": True}
SHORT = 1.5
OF_A_PROCESS = ("in_a_new_process_it_computes_the_same", "a_worker_whose_step_hangs_ends")


def maker(kind: type, tiny: str) -> Maker:
    options = SHAPE if issubclass(kind, SyntheticBackend) else {"model": tiny}
    if kind is Pieces:
        options = {**options, "pool_tokens": 2048, "context_tokens": 256}
    return Maker(f"{kind.__module__}:{kind.__name__}", kind, dict(options))


@pytest.fixture(scope="module")
def reference(tiny):
    """Cut otherwise than the plug-ins, so that every handoff converts."""
    more = {"block_tokens": 8, "axes": "layer kv block token head dim"}
    return Maker("sound", Sound, {"model": tiny, "pool_blocks": 256, **more})


def look(kind, tiny, reference, promises, **more):
    bench = SteppedBench(maker(kind, tiny), reference, **more)
    try:
        return examine(promises, bench)
    finally:
        bench.close()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda it: it.__name__)
def test_a_broken_plug_in_breaks_the_promise_that_it_breaks(mutant, tiny, reference):
    more = {"patience": SHORT} if mutant is Hangs else {}
    (verdict,) = look(mutant, tiny, reference, [PROMISES[MUTANTS[mutant]]], **more)
    assert verdict.outcome == "broken", verdict
    assert verdict.detail


@pytest.mark.parametrize("kind", [Sound, Apart], ids=lambda it: it.__name__)
def test_a_sound_plug_in_keeps_every_promise(kind, tiny, reference):
    promises = [promise for name, promise in PROMISES.items() if name not in OF_A_PROCESS]
    verdicts = look(kind, tiny, reference, promises)
    assert not [it for it in verdicts if it.outcome != "kept"]


def test_a_pool_may_be_in_pieces(tiny, reference):
    words = ("handoff", "survives", "continues", "position", "rows_lie", "copied", "frees", "ready")
    some = [promise for name, promise in PROMISES.items() if any(word in name for word in words)]
    verdicts = look(Pieces, tiny, reference, some)
    assert not [it for it in verdicts if it.outcome != "kept"]
    assert len(verdicts) > len(words)


def test_of_made_up_tokens_all_is_kept_that_can_be_said(tiny, reference):
    verdicts = look(SyntheticBackend, tiny, None, STEPPED)
    assert not [it for it in verdicts if it.outcome == "broken"]
    assert not [it for it in verdicts if it.outcome == "unproven" and not it.detail]
    kept = {it.promise for it in verdicts if it.outcome == "kept"}
    assert kept >= {*OF_A_PROCESS, "decode_after_handoff_equals_decode_in_place"}


def test_every_promise_of_the_plug_in_itself_is_broken_by_some_mutant():
    hosts = {"a_worker_refuses_what_it_cannot_do"}  # from what was stated, whatever the plug-in
    assert set(PROMISES) - set(MUTANTS.values()) == hosts


def test_whoever_only_rounds_otherwise_than_stated_is_told_so_wherever_it_shows(tiny, reference):
    words = ("chunks", "agrees_with_prefill", "logprobs_agree", "batch")
    some = [it for name, it in PROMISES.items() if any(word in name for word in words)]
    details = {it.detail for it in look(NotQuiteExact, tiny, reference, some) if it.detail}
    assert details == {NOT_EXACT}


@pytest.mark.parametrize(
    ("mutant", "right"),
    [
        (OtherPairing, "info.layout.rope: the pool is 'half', not 'interleaved' as stated"),
        (OtherAxes, "info.layout.axes: the pool is 'block layer kv head token dim', not"),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_a_layout_that_is_not_as_stated_is_named_as_it_is(mutant, right, tiny, reference):
    (verdict,) = look(mutant, tiny, reference, [PROMISES[MUTANTS[mutant]]])
    assert verdict.detail.startswith(right)
