"""Promises about what is added to logits, or taken from them, before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence as Items

import msgspec

from backends.api import Sampling
from backends.testing.choosing.asking import (
    LIFTED,
    STRONGEST,
    Chooser,
    context,
    contexts,
    declared,
    known,
    one,
    plain,
)
from backends.testing.form import Unproven, require

LEAST, MOST = 0.01, 10.0
"""Of a repetition penalty, as a gateway lets it through."""

Case = tuple[tuple[int, ...], float, tuple[float, ...], int]
"""Which of three tokens were generated, the penalty, their logits, and which of them is chosen."""

PRESENCE: tuple[Case, ...] = (
    ((0,), 2.0, (0.0, -1.0, -5.0), 1),
    ((0, 0, 0), 1.0, (0.0, -2.0, -5.0), 0),
    ((1,), -2.0, (0.0, -1.0, -5.0), 1),
    ((2,), 2.0, (0.0, -1.0, -1.0), 0),
)
FREQUENCY: tuple[Case, ...] = (
    ((0,), 2.0, (0.0, -1.0, -5.0), 1),
    ((0, 0, 0), 1.0, (0.0, -2.0, -5.0), 1),
    ((0, 0, 1), 1.0, (0.0, -0.5, -5.0), 1),
    ((1, 1), -1.0, (0.0, -1.0, -5.0), 1),
    ((2,), 2.0, (0.0, -1.0, -1.0), 0),
)


def repetition_penalty_is_honoured(bench: Chooser) -> None:
    """Tokens of prompt and generated text are less likely above 1, more likely below."""
    declared(bench, "repetition_penalty", "temperature")
    more = Sampling(temperature=0.0, repetition_penalty=LEAST)
    less = Sampling(temperature=0.0, repetition_penalty=MOST)
    looked = favoured = avoided = 0
    for prompt in contexts(bench.info):
        for split in (len(prompt), 1) if bench.goes_on else (len(prompt),):
            text, generated = prompt[:split], prompt[split:]
            if plain(bench, text, generated) in prompt:
                continue
            looked += 1
            favoured += one(bench, more, text, generated) in prompt
            avoided += one(bench, less, text, generated) not in prompt
    if not looked:
        raise Unproven("this model always says a token of the prompt again")
    require(
        favoured > looked / 2,
        f"repetition_penalty: below 1 a token of prompt or text was favoured in {favoured} "
        f"of {looked} contexts; divide positive logits by it and multiply negative ones",
    )
    require(
        avoided > looked / 2,
        f"repetition_penalty: above 1 tokens of prompt and generated text were avoided in {avoided}"
        f" of {looked} contexts",
    )


def presence_penalty_is_honoured(bench: Chooser) -> None:
    """It is subtracted from tokens that were generated, however often, and from no others."""
    _require_additive(bench, "presence_penalty", PRESENCE)


def frequency_penalty_is_honoured(bench: Chooser) -> None:
    """It is subtracted from generated tokens as often as they were, and from no others."""
    _require_additive(bench, "frequency_penalty", FREQUENCY)


def _require_additive(bench: Chooser, name: str, cases: Items[Case]) -> None:
    if not bench.goes_on:
        raise Unproven("a prefix has no generated tokens, and it does not decode")
    declared(bench, name, "temperature", "logit_bias")
    for prompt in list(contexts(bench.info))[:4]:
        tokens = prompt[:3]
        for places, penalty, logits, right in cases:
            generated = [tokens[place] for place in places]
            values = dict(known(bench, prompt, generated))
            if not values.keys() >= set(tokens):
                raise Unproven(
                    "that takes the log probabilities of a whole vocabulary: a model with a "
                    "smaller one (--tiny-model)"
                )
            bias = {
                token: LIFTED + wanted - values[token]
                for token, wanted in zip(tokens, logits, strict=True)
            }
            wanted = {"temperature": 0.0, "logit_bias": bias, name: penalty}
            found = one(bench, msgspec.convert(wanted, Sampling), prompt, generated)
            require(
                found == tokens[right],
                f"{name}: {penalty:g} after the generated tokens {generated} gives token {found}, "
                f"not {tokens[right]}; subtract it from the logits of generated tokens alone, "
                "before anything else",
            )


def logit_bias_is_honoured(bench: Chooser) -> None:
    """It is added to the logits of its tokens before anything else; ids beyond have no effect."""
    declared(bench, "logit_bias", "temperature")
    vocabulary = bench.info.vocabulary
    prompt = context(bench.info)
    best = plain(bench, prompt)
    other = (best + 7) % vocabulary
    for bias, right in (
        ({other: STRONGEST}, [other]),
        ({best: -STRONGEST, vocabulary - 1: 0.0}, [it for it in range(vocabulary) if it != best]),
    ):
        found = one(bench, Sampling(temperature=0.0, logit_bias=bias), prompt)
        require(found in right, f"logit_bias: {bias} gives token {found}")
