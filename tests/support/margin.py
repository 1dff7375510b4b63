"""When two runs of one float32 engine may differ, and when a difference is an error.

Batch size and chunking change the order of additions, so logits agree to about 1e-4 and not to
the bit. Two runs are the same when their tokens are equal, or when at the first difference both
tokens could have been chosen from logits that lie within `MARGIN` of each other: for greedy
choice, both are within the margin of the largest; for a seeded one, the random number lies
within the margin of both tokens' share of the distribution. What follows that point is another
text and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from backends.sampling import uniform

MARGIN = 1e-3


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first place where the two differ, a missing token counting as one."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return None if len(left) == len(right) else min(len(left), len(right))


def assert_same_or_near_tie(
    left: Sequence[int],
    right: Sequence[int],
    *,
    prompt: Sequence[int],
    logits_after: Callable[[list[int]], np.ndarray],
    temperature: float = 0.0,
    seed: int = 0,
    margin: float = MARGIN,
) -> None:
    """Fail unless two continuations of `prompt` are the same in the sense above.

    `logits_after(tokens)` gives the next token's logits, up to a constant, from any engine that
    is right to well below the margin.
    """
    place = first_difference(left, right)
    if place is None:
        return
    assert place < min(len(left), len(right)), f"one run ended at {place}: {left} {right}"
    logits = np.asarray(logits_after([*prompt, *left[:place]]), np.float64)
    for token in (left[place], right[place]):
        miss = (
            logits.max() - logits[token]
            if temperature == 0
            else _miss(logits / temperature, token, uniform(seed, len(prompt) + place))
        )
        assert miss <= margin, (
            f"token {token} at {place} misses by {miss:.2g}: {left[place]} and {right[place]}"
            f" are no near tie"
        )


def _miss(logits: np.ndarray, token: int, chance: float) -> float:
    """How far `chance` lies outside the share that `token` has of the distribution, by id."""
    weights = np.exp(logits - logits.max())
    reached = np.cumsum(weights) / weights.sum()
    low = reached[token - 1] if token else 0.0
    return float(max(low - chance, chance - reached[token], 0.0))
