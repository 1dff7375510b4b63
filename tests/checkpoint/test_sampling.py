"""Sampling agrees with a slow oracle written from the contract, and depends on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backends.api import Sampling, Sequence
from backends.errors import StepFailed
from backends.sampling import choose, uniform

VOCABULARY = 50
ENDS = (3, 4)


def sequence(prompt=(1, 2, 3), generated=(5, 5, 6), seed=11, **sampling) -> Sequence:
    return Sequence(
        prompt=list(prompt), generated=list(generated), sampling=Sampling(**sampling), seed=seed
    )


def draw(row, one: Sequence):
    return choose(row, one, ENDS)


def logits(seed=0, size=VOCABULARY) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def oracle(row, one: Sequence) -> dict[int, float]:
    """The distribution that the contract describes, by loops over Python floats."""
    wanted = one.sampling
    values = [float(x) for x in row]
    for token in set(one.prompt) | set(one.generated):
        penalty = wanted.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(one.generated):
        values[token] -= wanted.presence_penalty
        values[token] -= wanted.frequency_penalty * one.generated.count(token)
    for token, bias in wanted.logit_bias.items():
        if 0 <= token < len(values):
            values[token] += bias
    if wanted.min_tokens > len(one.generated):
        for token in (*(() if wanted.ignore_eos else ENDS), *wanted.stop_token_ids):
            if token < len(values):
                values[token] = -math.inf
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if wanted.temperature == 0:
        return {order[0]: 1.0}
    weights = {t: math.exp((values[t] - values[order[0]]) / wanted.temperature) for t in order}
    kept = order[: wanted.top_k] if wanted.top_k else order
    total = sum(weights[t] for t in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        nucleus.append(token)
        reached += weights[token]
        if reached >= wanted.top_p * total:
            break
    kept = [t for t in nucleus if weights[t] >= wanted.min_p * weights[order[0]] and weights[t]]
    total = sum(weights[t] for t in kept)
    return {t: weights[t] / total for t in kept}


CASES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 7},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_p": 0.0},
    {"top_k": 1},
    {"top_k": 500},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.02, "temperature": 1.4},
    {"temperature": 0.0, "repetition_penalty": 4.0},
    {"repetition_penalty": 1.7, "top_p": 0.9},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"logit_bias": {7: 5.0, 9: -100.0, 4000: 3.0}},
    {"min_tokens": 4, "stop_token_ids": (8, 4000), "top_p": 0.99},
    {"min_tokens": 4, "ignore_eos": True},
    {"min_tokens": 3, "stop_token_ids": (8,)},
]


@pytest.mark.parametrize("wanted", CASES, ids=str)
def test_the_choice_is_the_oracles_inverse_distribution_at_the_seeds_number(wanted):
    for trial in range(60):
        row = logits(trial)
        one = sequence(seed=trial * 7919, **wanted)
        expected = oracle(row, one)
        chance, reached = uniform(one.seed, 6), 0.0
        token = draw(row, one).token
        assert token in expected
        for candidate in sorted(expected):
            low, reached = reached, reached + expected[candidate]
            if candidate == token:
                assert low - 1e-6 <= chance <= reached + 1e-6


def test_frequencies_are_those_of_the_distribution():
    row = logits(5)
    count = 20_000
    drawn = [draw(row, sequence(seed=s, temperature=1.0)).token for s in range(count)]
    expected = oracle(row, sequence(temperature=1.0))
    chi = sum(
        (drawn.count(token) - count * p) ** 2 / (count * p)
        for token, p in expected.items()
        if count * p >= 5
    )
    assert chi < 95, "about 40 are expected; 95 has a chance below one in a million"


def test_numbers_of_neighbouring_seeds_and_positions_are_unrelated():
    grid = np.array([[uniform(s, p) for p in range(200)] for s in range(200)])
    assert abs(grid.mean() - 0.5) < 0.01
    for left, right in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.02
    diagonal = np.corrcoef(grid[1:, :-1].ravel(), grid[:-1, 1:].ravel())[0, 1]
    assert abs(diagonal) < 0.02
    assert uniform(-1, 3) == uniform((1 << 64) - 1, 3)


def test_a_choice_depends_on_seed_and_position_and_on_no_earlier_call():
    row = logits(2)
    first = [draw(row, sequence(seed=s)).token for s in range(50)]
    assert first == [draw(row, sequence(seed=s)).token for s in range(50)]
    later = [draw(row, sequence(seed=s, generated=(5,))).token for s in range(50)]
    assert first != later


def test_equal_logits_go_to_the_lowest_id():
    row = np.zeros(VOCABULARY, np.float32)
    row[[9, 20, 30]] = 1
    assert draw(row, sequence(temperature=0.0)).token == 9
    drawn = {draw(row, sequence(seed=s, top_k=2)).token for s in range(100)}
    assert drawn == {9, 20}


def test_logprobs_are_those_of_the_raw_logits_though_a_bias_made_the_choice():
    row = logits(1)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    one = sequence(temperature=0.0, logit_bias={17: 100.0}, logprobs=4)
    sampled = draw(row, one)
    assert sampled.token == 17
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(exact[17], abs=1e-6)
    best = np.argsort(-row, kind="stable")[:4]
    assert [token for token, _ in sampled.logprob.top] == best.tolist()
    assert [value for _, value in sampled.logprob.top] == pytest.approx(exact[best], abs=1e-6)
    none_asked = sequence(temperature=0.0, logprobs=0)
    assert draw(row, none_asked).logprob.top == ()


def test_the_logits_are_left_as_they_were():
    row = logits(3)
    before = row.copy()
    draw(row, sequence(repetition_penalty=2.0, logit_bias={1: 4.0}, min_tokens=9, top_p=0.5))
    assert (row == before).all()


@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1e6])
def test_extreme_temperatures_still_choose_a_token(temperature):
    row = logits(4)
    tokens = {draw(row, sequence(seed=s, temperature=temperature)).token for s in range(40)}
    assert (tokens == {int(row.argmax())}) == (temperature < 1)


def test_logits_that_are_not_numbers_fail_the_step():
    row = logits(4)
    row[3] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(StepFailed, match="finite"):
            draw(row, sequence(temperature=temperature))


def test_banning_the_whole_vocabulary_bans_nothing():
    one = sequence(min_tokens=99, stop_token_ids=tuple(range(VOCABULARY)))
    assert 0 <= draw(logits(), one).token < VOCABULARY


def test_a_large_vocabulary_is_cut_to_the_same_nucleus():
    row = logits(8, 49152)
    for share in (0.3, 0.9, 0.99999):
        one = sequence(seed=5, top_p=share)
        expected = oracle(row, one)
        drawn = {draw(row, sequence(seed=s, top_p=share)).token for s in range(200)}
        assert drawn <= expected.keys()
