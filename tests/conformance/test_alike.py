"""How alike two engines must be, by what they compute in."""

import math

import pytest

from backends.api import KVLayout, Logprob, Sampled
from backends.testing import Broken
from backends.testing.alike import (
    EXACT,
    FLOAT32,
    HALF,
    QUANTISED,
    apart,
    bounds_of,
    require_alike,
    within,
)


def layout(weights="float32", dtype="float32"):
    return KVLayout(
        model="m", weights=weights, layers=1, kv_heads=1, head_dim=8, dtype=dtype, block_tokens=8,
        rope="half",
    )  # fmt: skip


def said(*logits: float) -> Sampled:
    """The greedy choice of a vocabulary with these logits, and all log probabilities."""
    norm = math.log(sum(math.exp(it) for it in logits))
    ranked = sorted(enumerate(it - norm for it in logits), key=lambda it: -it[1])
    return Sampled(ranked[0][0], Logprob(*ranked[0], tuple(ranked)))


def test_the_weaker_side_sets_the_bounds():
    assert bounds_of(layout(), layout()) is FLOAT32
    assert bounds_of(layout(), layout("bfloat16", "bfloat16")) is HALF
    assert bounds_of(layout(), layout(dtype="float16")) is HALF
    assert bounds_of(layout("bfloat16"), layout("q4")) is QUANTISED


def test_the_divergence_is_that_of_the_measure_from_the_other():
    measure, other = said(1.0, 0.0), said(0.0, 1.0)
    p = math.e / (math.e + 1)
    expected = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    found = apart([other], [measure])
    assert found.kl == pytest.approx(expected)
    assert (found.top1, found.first) == (0.0, 0)
    assert apart([measure], [measure]).kl == 0


@pytest.mark.parametrize("bounds", [EXACT, FLOAT32, HALF, QUANTISED])
def test_what_is_no_number_is_not_alike(bounds):
    right = said(1.0, 0.0)
    strange = Sampled(right.token, Logprob(right.token, math.nan, ((0, math.nan), (1, math.nan))))
    assert within([right], [right], bounds)
    assert not within([strange], [right], bounds)
    assert not within([right], [strange], bounds)


def test_tokens_that_only_one_side_lists_count_too():
    whole, cut = said(3.0, 2.0, 0.0), said(3.0, 2.0, 0.0)
    cut = Sampled(cut.token, Logprob(cut.token, cut.logprob.logprob, cut.logprob.top[:2]))
    assert apart([whole], [cut]).kl == pytest.approx(0, abs=1e-9)
    assert apart([said(0.0, 0.0, 9.0)], [cut]).kl > 3


@pytest.mark.parametrize(
    ("bounds", "gap", "right"),
    [(EXACT, 1e-9, False), (FLOAT32, 5e-4, True), (FLOAT32, 0.05, False), (HALF, 0.3, True),
     (HALF, 1.0, False), (QUANTISED, 1.0, False), (QUANTISED, 0.6, True)],
)  # fmt: skip
def test_near_ties_are_equal_by_how_well_one_can_tell(bounds, gap, right):
    ours, theirs = [said(0.0, gap)], [said(gap, 0.0)]
    if right and bounds is not FLOAT32:  # the text is otherwise the same
        ours, theirs = ours + [said(9.0, 0.0)] * 9, theirs + [said(9.0, 0.0)] * 9
    if right:
        require_alike(ours, theirs, bounds, "it differs")
    else:
        with pytest.raises(Broken, match="it differs"):
            require_alike(ours, theirs, bounds, "it differs")


def test_without_log_probabilities_texts_are_compared():
    same, other = [Sampled(1)] * 8, [Sampled(1)] * 7 + [Sampled(2)]
    require_alike(other, same, HALF, "")
    with pytest.raises(Broken):
        require_alike(other, same, FLOAT32, "")
    with pytest.raises(Broken):
        require_alike([Sampled(2)] * 8, same, QUANTISED, "")
    with pytest.raises(Broken, match="7 tokens where there are 8"):
        require_alike(same[:7], same, FLOAT32, "")
