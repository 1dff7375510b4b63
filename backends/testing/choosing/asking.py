"""What promises about the choice of tokens are made of: something that chooses, and known odds.

Nothing is asked for that a gateway refuses: temperatures up to 2, penalties up to 2 either way,
a bias up to 100. Where `logit_bias` is honoured it makes the odds: it lifts a few tokens, whose
log probabilities are known, far above all others and to where the right answer is plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Protocol

import msgspec

from backends.api import BackendInfo, Sampled, Sampling
from backends.testing.alike import MOST_ALTERNATIVES
from backends.testing.form import Bench, Unproven

GREEDY = Sampling(temperature=0.0)

DRAWS = 64
"""Enough that a token of a tenth of the weight is missed once in a thousand times."""

HOT = 2.0
"""The highest temperature that a gateway lets through."""

STRONGEST = 100.0
"""The largest bias."""

LIFTED = 50.0
"""Where lifted tokens are, in nats; all others are below 0."""

CONTEXTS = 8
SLACK = 1e-3


class Chooser(Bench, Protocol):
    """A bench whose plug-in chooses tokens."""

    @property
    def info(self) -> BackendInfo:
        """What it states."""

    @property
    def judged(self) -> Sampling:
        """As `judging`."""

    @property
    def goes_on(self) -> bool:
        """Whether it can be asked what follows generated tokens."""

    def choose(
        self,
        sampling: Sampling,
        prompt: Items[int],
        generated: Items[int] = (),
        seeds: Items[int] = (0,),
    ) -> list[Sampled]:
        """What is sampled after prompt and generated tokens, once for each seed.

        Raises:
            Unproven: it never goes on after generated tokens.
        """


def one(bench: Chooser, sampling: Sampling, prompt: Items[int], generated: Items[int] = ()) -> int:
    """The one token that is sampled."""
    return bench.choose(sampling, prompt, generated)[0].token


def plain(bench: Chooser, prompt: Items[int], generated: Items[int] = ()) -> int:
    """The likeliest token."""
    return one(bench, GREEDY, prompt, generated)


def declared(bench: Chooser, *names: str) -> None:
    """Make sure that it declares these parameters, and that its tokens follow from logits.

    Raises:
        Unproven: it does not.
    """
    missing = [name for name in names if name not in bench.info.sampling]
    if missing:
        raise Unproven(f"it does not declare `{missing[0]}`, so requests that set it go elsewhere")
    if bench.info.emulated:
        raise Unproven("info.emulated: its tokens may be made up")


def contexts(info: BackendInfo) -> Iterator[list[int]]:
    """Some prompts of a dozen tokens, none of them twice in one."""
    length = min(12, info.vocabulary // 4, info.context_tokens // 4)
    for number in range(CONTEXTS):
        yield [(number * 131 + it * 17 + 3) % info.vocabulary for it in range(length)]


def context(info: BackendInfo) -> list[int]:
    """The first of them."""
    return next(contexts(info))


def known(
    bench: Chooser, prompt: Items[int], generated: Items[int] = ()
) -> list[tuple[int, float]]:
    """Tokens and their log probabilities, likeliest first: as many as it tells.

    Raises:
        Unproven: it tells none.
    """
    judged = bench.judged
    if judged.logprobs is None:
        raise Unproven("that takes log probabilities, and it does not declare `logprobs`")
    (sampled,) = bench.choose(judged, prompt, generated)
    if sampled.logprob is None:
        raise Unproven("that takes log probabilities, and it gives none")
    return list(sampled.logprob.top)


class Odds(msgspec.Struct, frozen=True):
    """Which tokens can be drawn with a `bias`, and their logits but for a constant, best first."""

    bias: dict[int, float]
    ranked: list[tuple[int, float]]

    def sampling(self, **more: float) -> Sampling:
        """As they are made, and otherwise as asked."""
        return msgspec.convert({"logit_bias": self.bias, **more}, Sampling)

    def shares(self, temperature: float) -> list[tuple[int, float]]:
        """Tokens and their probabilities at that temperature, likeliest first."""
        highest = self.ranked[0][1]
        weights = [math.exp((value - highest) / temperature) for _, value in self.ranked]
        return [
            (token, weight / sum(weights))
            for (token, _), weight in zip(self.ranked, weights, strict=True)
        ]

    def nucleus(self, temperature: float, reach: float) -> set[int]:
        """The fewest likeliest tokens that have so much of the weight."""
        found: set[int] = set()
        reached = 0.0
        for token, weight in self.shares(temperature):
            if reached >= reach:
                break
            found.add(token)
            reached += weight
        return found


def odds(bench: Chooser, prompt: Items[int], logits: Items[float]) -> Odds:
    """The likeliest tokens with these `logits`, best first; or the model's own of all tokens.

    Raises:
        Unproven: it has no `logit_bias` to make them with, and does not tell all of the model's.
    """
    ranked = known(bench, prompt)
    if "logit_bias" in bench.info.sampling and len(ranked) >= len(logits):
        chosen = list(zip(ranked, logits, strict=False))
        bias = {token: LIFTED + wanted - value for (token, value), wanted in chosen}
        return Odds(bias, [(token, wanted) for (token, _), wanted in chosen])
    if len(ranked) < bench.info.vocabulary:
        raise Unproven(
            "that takes `logit_bias`, or the log probabilities of a whole vocabulary: `logprobs` "
            f"of up to {MOST_ALTERNATIVES} tokens, on a model that has no more (--tiny-model)"
        )
    return Odds({}, ranked)


def share(drawn: Items[Sampled], tokens: set[int]) -> float:
    """How much of what was drawn is among these tokens."""
    return sum(it.token in tokens for it in drawn) / len(drawn)
