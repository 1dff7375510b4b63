"""Choose the next token as a pure function of logits, tokens, parameters, seed and position.

numpy on one row at a time, so that the batch around a row cannot change it. The choice inverts
the cumulative distribution in the order of token ids, not of probabilities: two logits that
differ in their last bit then change the outcome with a chance of that size, where a sorted order
would swap whole tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api import Logprob, Sampled, Sampling, Sequence
from backends.errors import StepFailed

Row = NDArray[np.float32]

HONOURED = frozenset(Sampling.__struct_fields__)
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_LIKELY = np.float32(1e-3)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this seed and position: splitmix64 (Steele, Lea and Flood, 2014)."""
    return (_mix(_mix(seed & _MASK) ^ position) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def is_plain_greedy(sequence: Sequence) -> bool:
    """Whether the choice is simply the likeliest token, and nothing else is asked for."""
    wanted = sequence.sampling
    return (
        wanted.temperature == 0
        and wanted.logprobs is None
        and wanted.min_tokens <= len(sequence.generated)
        and not _reweighs(wanted)
    )


def choose(logits: Row, sequence: Sequence, end_tokens: Items[int]) -> Sampled:
    """The next token of `sequence`. `logits` is its whole row, float32, and is not changed.

    Ids outside the vocabulary, in a bias or a stop list, have no effect.

    Raises:
        StepFailed: the logits hold no finite maximum.
    """
    wanted = sequence.sampling
    row = _adjusted(logits, sequence, end_tokens)
    best = int(row.argmax())
    if not np.isfinite(row[best]):
        raise StepFailed(f"the model gave no finite logit (largest: {row[best]})")
    if wanted.temperature > 0:
        position = len(sequence.prompt) + len(sequence.generated)
        best = _draw(row, wanted, uniform(sequence.seed, position))
    if wanted.logprobs is None:
        return Sampled(best)
    return Sampled(best, logprob_of(logits, best, wanted.logprobs))


def _adjusted(logits: Row, sequence: Sequence, end_tokens: Items[int]) -> Row:
    """The row after penalties, bias and `min_tokens`; a copy if any of them applies."""
    wanted = sequence.sampling
    early = wanted.min_tokens > len(sequence.generated)
    if not early and not _reweighs(wanted):
        return logits
    row = logits.copy()
    _penalise(row, sequence)
    for token, bias in wanted.logit_bias.items():
        if 0 <= token < len(row):
            row[token] += np.float32(bias)
    if early:
        ends = () if wanted.ignore_eos else end_tokens
        banned = {token for token in (*ends, *wanted.stop_token_ids) if 0 <= token < len(row)}
        if len(banned) < len(row):
            row[list(banned)] = -np.inf
    return row


def _penalise(row: Row, sequence: Sequence) -> None:
    wanted = sequence.sampling
    if wanted.repetition_penalty != 1:
        seen = np.array([*sequence.prompt, *sequence.generated], np.int64)
        values, factor = row[seen], np.float32(wanted.repetition_penalty)
        row[seen] = np.where(values > 0, values / factor, values * factor)
    if (wanted.presence_penalty or wanted.frequency_penalty) and sequence.generated:
        tokens, counts = np.unique(np.array(sequence.generated), return_counts=True)
        penalty = wanted.presence_penalty + wanted.frequency_penalty * counts
        row[tokens] -= penalty.astype(np.float32)


def logprob_of(logits: Row, token: int, alternatives: int) -> Logprob:
    """The log probability of `token` under `logits`, and the likeliest tokens, best first."""
    largest = float(logits.max())
    total = np.exp(logits - np.float32(largest)).sum(dtype=np.float64)
    norm = largest + float(np.log(total))
    count = min(max(alternatives, 0), len(logits))
    top = tuple((int(t), float(logits[t]) - norm) for t in _largest(logits, count))
    return Logprob(token, float(logits[token]) - norm, top)


def _reweighs(wanted: Sampling) -> bool:
    return bool(
        wanted.logit_bias
        or wanted.repetition_penalty != 1
        or wanted.presence_penalty
        or wanted.frequency_penalty
    )


def _draw(row: Row, wanted: Sampling, chance: float) -> int:
    with np.errstate(over="ignore", under="ignore"):
        weights: Row = np.exp((row - row.max()) / np.float32(max(wanted.temperature, 1e-30)))
    if 0 < wanted.top_k < len(weights):
        kept = np.zeros_like(weights)
        keep = _largest(weights, wanted.top_k)
        kept[keep] = weights[keep]
        weights = kept
    if wanted.top_p < 1:
        weights = _nucleus(weights, wanted.top_p)
    if wanted.min_p > 0:
        weights = np.where(weights >= np.float32(wanted.min_p), weights, np.float32(0))
    reached = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(reached, chance * reached[-1], side="right"))
    if place < len(weights):
        return place
    return int(np.flatnonzero(weights)[-1])  # rounding took the product up to the sum itself


def _largest(values: Row, count: int) -> NDArray[Any]:
    """Indices of the `count` largest values, best first, equal ones by index."""
    if count <= 0:
        return np.empty(0, np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order][:count]


def _nucleus(weights: Row, share: float) -> Row:
    """The fewest likeliest tokens that reach `share` of the weight; at least one."""
    wanted = share * float(weights.sum(dtype=np.float64))
    candidates = np.flatnonzero(weights >= _LIKELY)  # the largest weight is 1
    if float(weights[candidates].sum(dtype=np.float64)) < wanted:
        candidates = np.flatnonzero(weights)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    kept = order[before < wanted] if wanted > 0 else order[:1]
    result = np.zeros_like(weights)
    result[kept] = weights[kept]
    return result
