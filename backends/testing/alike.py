"""How far two engines may be apart, and how far they are. The bounds were fixed beforehand.

Two runs over the same tokens are compared position by position: the distribution of the next token
(Kullback-Leibler divergence, in nats) where both give log probabilities, and the likeliest token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items

import msgspec

from backends.api import BackendInfo, Sampled, Sampling
from backends.testing.form import Broken, Unproven
from transfer.layout import KVLayout

TIE = 1e-3
"""Tokens whose logits are that close may change places in float32: orders of addition differ, and
that moves logits by about 1e-4."""

MOST_ALTERNATIVES = 4096
"""Log probabilities asked for at each position, at most; what is beyond counts as one token."""

_FLOATS = frozenset({"float32", "float16", "bfloat16"})


def judging(info: BackendInfo) -> Sampling:
    """Greedy, with log probabilities where the backend gives them.

    Raises:
        Unproven: it is never greedy.
    """
    if "temperature" not in info.sampling:
        raise Unproven("it does not declare `temperature`, so nobody can ask it to be greedy")
    wanted = min(info.vocabulary, MOST_ALTERNATIVES)
    return Sampling(
        temperature=0.0,
        ignore_eos="ignore_eos" in info.sampling,
        logprobs=wanted if "logprobs" in info.sampling else None,
    )


class Bounds(msgspec.Struct, frozen=True):
    """`kl` is the largest mean divergence, `top1` the least share of equal likeliest tokens.

    `tie`: unlike likeliest tokens count as equal where their log probabilities are that close.
    `logit` is how far a single log probability may be off.
    """

    name: str
    kl: float
    top1: float
    tie: float
    logit: float
    roughly: Bounds | None = None
    """Where a backend claims more than its precision gives: the bounds of that."""


NOT_EXACT = (
    'info.continuation is "exact", but what it computes is not the same to the bit on every way; '
    'it only rounds otherwise, so state "equivalent"'
)

EXACT = Bounds("exact", 0.0, 1.0, 0.0, 1e-6)
"""To the bit: what a backend with `continuation` "exact" says of itself."""

FLOAT32 = Bounds("float32", 1e-5, 1.0, TIE, 1e-2)
"""Equal text. Logits that differ by 1e-4 give a divergence below 1e-8; float16 KV, 1e-7."""

HALF = Bounds("16 bit", 0.03, 0.85, 0.5, 2.0)
"""bfloat16 changes logits of SmolLM2-135M by up to 0.7, often across its many near ties, but the
divergence is only 8e-4. KV in the wrong RoPE pairing diverges by 3.2."""

QUANTISED = Bounds("quantised", 0.3, 0.7, 2.0, 4.0)
"""4-bit weights with 8-bit activations change logits of that model by up to 1.3; the divergence is
3e-3, on longer texts more. Still far from what a wrong layout does."""

BLIND = 0.5
"""The share of equal likeliest tokens where nobody can tell a near tie, as there are no log
probabilities, and numbers are not float32."""


def bounds_of(*layouts: KVLayout) -> Bounds:
    """What engines with these weights and pools owe each other."""
    kinds = {layout.weights for layout in layouts} | {str(layout.dtype) for layout in layouts}
    if kinds == {"float32"}:
        return FLOAT32
    return HALF if kinds <= _FLOATS else QUANTISED


def own_bounds(info: BackendInfo) -> Bounds:
    """How alike a backend must be to itself."""
    usual = bounds_of(info.layout)
    return msgspec.structs.replace(EXACT, roughly=usual) if info.continuation == "exact" else usual


class Apart(msgspec.Struct, frozen=True):
    """How far two runs are apart: `kl` is None where there are no log probabilities."""

    kl: float | None
    top1: float
    first: int | None
    """The first position with unlike likeliest tokens."""

    def __str__(self) -> str:
        """For people."""
        parts = [f"{self.top1:.0%} of the likeliest tokens agree"]
        if self.first is not None:
            parts[0] += f" (not at position {self.first})"
        if self.kl is not None:
            parts.append(f"the mean KL divergence is {self.kl:.2g}")
        return ", ".join(parts)


def apart(ours: Items[Sampled], theirs: Items[Sampled], tie: float = 0.0) -> Apart:
    """Compare runs over the same tokens, both greedy; `theirs` is the measure.

    Raises:
        Broken: one is shorter.
    """
    if len(ours) != len(theirs):
        raise Broken(f"{len(ours)} tokens where there are {len(theirs)}")
    pairs = list(zip(ours, theirs, strict=True))
    same = [_agree(one, other, tie) for one, other in pairs]
    divergences = [
        _divergence(dict(other.logprob.top), dict(one.logprob.top))
        for one, other in pairs
        if one.logprob is not None and other.logprob is not None
    ]
    return Apart(
        sum(divergences) / len(divergences) if divergences else None,
        sum(same) / len(same),
        same.index(False) if False in same else None,
    )


def require_alike(
    ours: Items[Sampled], theirs: Items[Sampled], bounds: Bounds, otherwise: str
) -> None:
    """Hold two runs over the same tokens to `bounds`.

    Raises:
        Broken: they are further apart; `otherwise` says what that means and what to fix.
    """
    found = apart(ours, theirs, bounds.tie)
    if within(ours, theirs, bounds):
        return
    if bounds.roughly is not None and within(ours, theirs, bounds.roughly):
        raise Broken(NOT_EXACT)
    raise Broken(
        f"{otherwise} ({found}; the bounds for {bounds.name} are {bounds.top1:.0%} "
        f"and {bounds.kl:g})"
    )


def within(ours: Items[Sampled], theirs: Items[Sampled], bounds: Bounds) -> bool:
    """Whether two runs over the same tokens are as alike as `bounds` say."""
    found = apart(ours, theirs, bounds.tie)
    blind = bounds.tie > TIE and any(it.logprob is None for it in theirs)
    return found.top1 >= (BLIND if blind else bounds.top1) and (found.kl or 0.0) <= bounds.kl


def _agree(one: Sampled, other: Sampled, tie: float) -> bool:
    if one.token == other.token:
        return True
    if not tie or other.logprob is None:
        return False
    known = dict(other.logprob.top)
    best, ours = known.get(other.token), known.get(one.token)
    return best is not None and ours is not None and best - ours <= tie


def _divergence(measure: dict[int, float], other: dict[int, float]) -> float:
    """KL(measure || other) over the tokens that both list, all others counting as one token."""
    floor = min(other.values(), default=0.0)
    total = left = left_other = 0.0
    for token, value in measure.items():
        share = math.exp(value)
        theirs = other.get(token, floor)
        total += share * (value - theirs)
        left += share
        left_other += math.exp(theirs)
    rest, rest_other = max(0.0, 1 - left), max(1e-12, 1 - left_other)
    if rest > 1e-9:
        total += rest * math.log(rest / rest_other)
    return 0.0 if total <= 0 else total  # and not-a-number stays what it is
