"""Promises about what is drawn at random, and how often."""

from __future__ import annotations

import math

from backends.api import Sampling
from backends.testing.choosing.asking import (
    DRAWS,
    GREEDY,
    HOT,
    SLACK,
    Chooser,
    Odds,
    context,
    declared,
    odds,
    one,
    plain,
    share,
)
from backends.testing.form import require

GAP = 3.8
"""At the temperature asked for, in nats: fifteen tokens that far below one have a quarter of the
weight. At half of that temperature they have next to none, at twice of it most."""

PEAK = (0.0, *[-GAP * HOT] * 15)
STAIRS = (0.0, -2.0, -4.0, -6.0, -8.0, -10.0)
SLOPE = tuple(-0.4 * it for it in range(8))

SIGMAS = 4.0
ROUNDED = 0.03
"""By how much rounding in 16 bit may shift such a weight."""


def temperature_is_honoured(bench: Chooser) -> None:
    """0 is the likeliest token; above, tokens are drawn as often as the temperature says."""
    declared(bench, "temperature")
    prompt = context(bench.info)
    best = plain(bench, prompt)
    require(
        all(one(bench, GREEDY, prompt) == best for _ in range(3)),
        "temperature: 0 gives now one token, now another; it is the likeliest",
    )
    hot = bench.choose(Sampling(temperature=HOT), prompt, seeds=range(DRAWS))
    require(
        len({it.token for it in hot}) > 1,
        f"temperature: at {HOT} one token is drawn, whatever the seed; draw at random",
    )
    made = odds(bench, prompt, PEAK)
    likelier = made.nucleus(HOT, 0.5)
    wanted = sum(weight for token, weight in made.shares(HOT) if token in likelier)
    drawn = bench.choose(made.sampling(temperature=HOT), prompt, seeds=range(2 * DRAWS))
    found = share(drawn, likelier)
    spread = SIGMAS * math.sqrt(wanted * (1 - wanted) / len(drawn)) + ROUNDED
    require(
        abs(found - wanted) <= spread,
        f"temperature: at {HOT} tokens of weight {wanted:.2f} were drawn {found:.0%} of the times; "
        "the distribution is softmax(logits / temperature)",
    )


def top_k_is_honoured(bench: Chooser) -> None:
    """Only the `top_k` likeliest tokens are drawn, each of them."""
    declared(bench, "top_k", "temperature")
    _require_best(bench, "top_k", 1)
    made = odds(bench, context(bench.info), SLOPE)
    _require_drawn(bench, made, "top_k", 3, {token for token, _ in made.ranked[:3]})


def top_p_is_honoured(bench: Chooser) -> None:
    """Only the fewest likeliest tokens that reach `top_p` are drawn, after temperature."""
    declared(bench, "top_p", "temperature")
    _require_best(bench, "top_p", 1e-6)
    made = odds(bench, context(bench.info), STAIRS)
    top_p = 0.75
    _require_drawn(bench, made, "top_p", top_p, made.nucleus(HOT, top_p + SLACK))


def min_p_is_honoured(bench: Chooser) -> None:
    """Only tokens at least `min_p` times as likely as the likeliest are drawn."""
    declared(bench, "min_p", "temperature")
    _require_best(bench, "min_p", 1.0)
    made = odds(bench, context(bench.info), STAIRS)
    shares, min_p = made.shares(HOT), 0.3
    allowed = {token for token, weight in shares if weight >= min_p * shares[0][1] - SLACK}
    _require_drawn(bench, made, "min_p", min_p, allowed)


def _require_best(bench: Chooser, name: str, value: float) -> None:
    """With `value` nothing but the likeliest token is left."""
    prompt = context(bench.info)
    wanted = Odds({}, []).sampling(temperature=HOT, **{name: value})
    drawn = bench.choose(wanted, prompt, seeds=range(DRAWS // 2))
    others = share(drawn, {plain(bench, prompt)}) < 1
    require(not others, f"{name}: {value:g} draws other tokens than the likeliest")


def _require_drawn(bench: Chooser, made: Odds, name: str, value: float, allowed: set[int]) -> None:
    """At the highest temperature, the tokens that are drawn with `value` are those `allowed`."""
    wanted = made.sampling(temperature=HOT, **{name: value})
    found = {it.token for it in bench.choose(wanted, context(bench.info), seeds=range(DRAWS))}
    require(
        found <= allowed,
        f"{name}: {value:g} at temperature {HOT:g} draws {len(found - allowed)} tokens beyond the "
        f"{len(allowed)} that it leaves; it applies after temperature",
    )
    likely = {token for token, weight in made.shares(HOT) if token in allowed and weight > 0.1}
    require(
        found >= likely and (len(allowed) < 4 or len(found) > 1),
        f"{name}: {value:g} at temperature {HOT:g} draws {len(found)} of the {len(allowed)} tokens "
        "that it leaves; it applies after temperature",
    )
