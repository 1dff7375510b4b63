"""What is learnt from measurements, and what is not."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.placement.estimates import Estimates, Work

ABSURD = (math.nan, math.inf, -1.0, 0.0, 1e9, 1e3, 1e-6)
SIZES = (100, 1000, 8000)


def truth(tokens: int) -> float:
    return 0.012 + 3.5e-4 * tokens + 2e-9 * tokens * tokens


def teach(
    learnt: Estimates, rng: random.Random, count: int, *, factor: float = 1.0, absurd: float = 0.0
) -> None:
    for _ in range(count):
        tokens = int(rng.lognormvariate(6.8, 1)) + 1
        seconds = factor * truth(tokens) * rng.lognormvariate(0, 0.1)
        told = rng.choice(ABSURD) if rng.random() < absurd else seconds
        learnt.prefilled("p", Work().and_prompt(tokens), told)


def errors(learnt: Estimates, factor: float = 1.0) -> list[float]:
    return [abs(learnt.prefill("p").seconds(n) / truth(n) / factor - 1) for n in SIZES]


@pytest.mark.parametrize("seed", range(5))
def test_twenty_prompts_teach_how_long_the_next_takes(seed: int) -> None:
    learnt = Estimates()
    assert not learnt.prefill("p").known
    teach(learnt, random.Random(seed), 20)
    assert learnt.prefill("p").known
    assert max(errors(learnt)) < 0.35
    teach(learnt, random.Random(seed + 100), 200)
    assert max(errors(learnt)) < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_absurd_measurements_change_little(seed: int) -> None:
    learnt = Estimates()
    teach(learnt, random.Random(seed), 400, absurd=0.05)
    assert max(errors(learnt)) < 0.2


@pytest.mark.parametrize("absurd", ABSURD)
def test_one_absurd_measurement_moves_nothing_far(absurd: float) -> None:
    learnt = Estimates()
    teach(learnt, random.Random(1), 100)
    before = learnt.prefill("p")
    learnt.prefilled("p", Work().and_prompt(1000), absurd)
    after = learnt.prefill("p")
    assert all(after.seconds(n) == pytest.approx(before.seconds(n), rel=0.05) for n in SIZES)


@pytest.mark.parametrize("factor", [3.0, 1 / 3, 1 / 10])
def test_a_worker_that_changes_is_followed(factor: float) -> None:
    learnt, rng = Estimates(), random.Random(2)
    teach(learnt, rng, 300)
    teach(learnt, rng, 60, factor=factor)
    assert errors(learnt, factor)[1] < 0.3


def test_tokens_that_were_kept_are_not_taken_for_fast_ones() -> None:
    learnt, rng = Estimates(), random.Random(3)
    for _ in range(200):
        tokens = rng.randrange(500, 8000)
        cached = rng.choice((0, tokens // 2, tokens - 1))
        took = truth(tokens) - truth(cached) + 0.012
        learnt.prefilled("p", Work().and_prompt(tokens, cached), took)
    assert learnt.prefill("p").seconds(8000) == pytest.approx(truth(8000), rel=0.1)
    assert learnt.prefill("p").seconds(8000, 7999) < 0.1


def test_steps_grow_with_batch_and_context() -> None:
    learnt, rng = Estimates(), random.Random(4)
    for _ in range(300):
        batch = rng.randrange(1, 64)
        context = batch * rng.randrange(100, 4000)
        learnt.stepped("d", batch, context, 0.01 + 2e-4 * batch + 5e-8 * context)
    cost = learnt.step("d")
    assert cost.seconds(1, 100) == pytest.approx(0.0102, rel=0.1)
    assert cost.seconds(60, 200_000) == pytest.approx(0.032, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_batch_teaches_nothing_wrong_of_it_where_context_grows_with_it(seed: int) -> None:
    """Batch and context cannot be told apart; what they do together must be right all the same."""
    learnt, rng = Estimates(), random.Random(seed)
    for number in range(300):
        batch = 20 + number % 10
        context = int(batch * 1250 * rng.uniform(0.8, 1.2))
        took = 0.01 + 2e-5 * batch + 6e-8 * context
        learnt.stepped("d", batch, context, took * rng.lognormvariate(0, 0.05))
        if number > 50:
            assert learnt.step("d").seconds(25, 25 * 1250) == pytest.approx(0.0124, rel=0.15)
    assert learnt.step("d").seconds(100, 125_000) == pytest.approx(0.0195, rel=0.5)


def test_links_are_learnt_apart() -> None:
    learnt = Estimates()
    for size in range(1, 40):
        learnt.moved("p", "near", size * 1_000_000, 0.001 + size * 1e-4)
        learnt.moved("p", "far", size * 1_000_000, 0.020 + size * 1e-2)
    assert learnt.link("p", "near").seconds(20_000_000) == pytest.approx(0.003, rel=0.2)
    assert learnt.link("p", "far").seconds(20_000_000) == pytest.approx(0.220, rel=0.2)


def test_a_worker_that_is_gone_is_forgotten() -> None:
    learnt = Estimates()
    for _ in range(10):
        learnt.prefilled("w", Work().and_prompt(100), 9.0)
        learnt.stepped("w", 1, 100, 9.0)
        learnt.moved("w", "d", 1, 9.0)
        learnt.moved("p", "w", 1, 9.0)
    learnt.forget("w")
    assert learnt.prefill("w") == learnt.prefill("new")
    assert learnt.step("w") == learnt.step("new")
    assert learnt.link("w", "d") == learnt.link("p", "w") == learnt.link("new", "new")


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1 << 20),
            st.floats(allow_nan=True, allow_infinity=True) | st.floats(1e-9, 3600),
        ),
        max_size=60,
    )
)
@settings(deadline=None, max_examples=300)
def test_whatever_is_measured_a_prediction_is_a_duration(measured: list) -> None:
    learnt = Estimates()
    for tokens, seconds in measured:
        learnt.prefilled("p", Work().and_prompt(tokens), seconds)
    for tokens in (1, 1000, 1 << 20):
        predicted = learnt.prefill("p").seconds(tokens)
        assert math.isfinite(predicted)
        assert predicted >= 0


def test_the_same_history_gives_the_same_numbers() -> None:
    one, other = Estimates(), Estimates()
    teach(one, random.Random(5), 50, absurd=0.1)
    teach(other, random.Random(5), 50, absurd=0.1)
    assert one.prefill("p") == other.prefill("p")
