"""Promises about log probabilities, and about what must not end a text yet."""

from __future__ import annotations

import math

import msgspec

from backends.api import Logprob, Sampled, Sampling
from backends.testing.alike import bounds_of
from backends.testing.choosing.asking import (
    GREEDY,
    HOT,
    SLACK,
    STRONGEST,
    Chooser,
    context,
    declared,
    known,
    one,
    plain,
)
from backends.testing.form import Unproven, require

COUNTS = (0, 1, 5)


def logprobs_are_honoured(bench: Chooser) -> None:
    """The chosen token's, and as many of the likeliest as asked for: best first, of raw logits."""
    info = bench.info
    if "logprobs" not in info.sampling:
        raise Unproven("it does not declare `logprobs`")
    prompt = context(info)
    for count in COUNTS:
        count = min(count, info.vocabulary)
        (sampled,) = bench.choose(Sampling(temperature=0.0, logprobs=count), prompt)
        found = _shaped(sampled, count)
        if count:
            require(
                abs(found.logprob - found.top[0][1]) <= SLACK,
                "logprobs: the greedy token is not as likely as the likeliest",
            )
    (sampled,) = bench.choose(GREEDY, prompt)
    require(sampled.logprob is None, "logprobs: None asks for none, not even the token's own")
    if info.emulated:
        return
    told = known(bench, prompt)
    if len(told) == info.vocabulary:
        total = sum(math.exp(value) for _, value in told)
        require(
            abs(total - 1) < 0.02,
            f"logprobs: the probabilities of the whole vocabulary add up to {total:.3f}",
        )
    _require_raw(bench, prompt, dict(told))


def _shaped(sampled: Sampled, count: int) -> Logprob:
    """What is told of a token for which so many alternatives were asked for."""
    found = sampled.logprob
    require(found is not None, f"logprobs: {count} gave none")
    assert found is not None
    require(found.token == sampled.token, "logprobs: of another token than was chosen")
    require(len(found.top) == count, f"logprobs: {count} gave {len(found.top)} alternatives")
    values = [value for _, value in found.top]
    require(values == sorted(values, reverse=True), "logprobs: they come best first")
    require(
        all(value <= SLACK for value in (*values, found.logprob)),
        "logprobs: above 0; they are natural logarithms of probabilities",
    )
    own = dict(found.top).get(found.token, found.logprob)
    require(
        abs(own - found.logprob) <= SLACK,
        f"logprobs: {found.logprob:.4f} of the chosen token, {own:.4f} of it among the likeliest",
    )
    return found


def _require_raw(bench: Chooser, prompt: list[int], told: dict[int, float]) -> None:
    """Neither temperature nor bias changes what is told of a token."""
    names = bench.info.sampling
    changes: dict[str, object] = {}
    if "temperature" in names:
        changes["temperature"] = HOT
    if "logit_bias" in names:
        changes["logit_bias"] = {list(told)[-1]: STRONGEST}
    most = bounds_of(bench.info.layout).logit
    wanted = msgspec.convert({"logprobs": len(told), **changes}, Sampling)
    for sampled in bench.choose(wanted, prompt, seeds=range(4)):
        for token, value in _shaped(sampled, len(told)).top:
            before = told.get(token, value)
            require(
                abs(value - before) <= most,
                f"logprobs: {value:.3f} of token {token}, {before:.3f} without "
                f"{' and '.join(changes)}; they are those of the raw logits",
            )


def min_tokens_is_honoured(bench: Chooser) -> None:
    """No end token and no stop id is chosen before so many were generated."""
    info = bench.info
    declared(bench, "min_tokens", "stop_token_ids", "temperature")
    prompt = context(info)
    cases: list[tuple[list[int], int, bool]] = [([], 1, True), ([], 0, False)]
    if bench.goes_on:
        cases += [([prompt[0]], 2, True), ([prompt[0]], 1, False)]
    for generated, wanted, banned in cases:
        best = plain(bench, prompt, generated)
        sampling = Sampling(temperature=0.0, stop_token_ids=(best,), min_tokens=wanted)
        found = one(bench, sampling, prompt, generated)
        require(
            (found != best) is banned,
            f"min_tokens: {wanted} after {len(generated)} generated tokens, a stop id "
            f"{'was' if banned else 'was not'} chosen; count generated tokens, not the prompt's",
        )
    if not info.end_tokens or "logit_bias" not in info.sampling:
        return
    end = info.end_tokens[0]
    early = Sampling(temperature=0.0, logit_bias={end: STRONGEST}, min_tokens=1)
    require(one(bench, early, prompt) != end, "min_tokens: an end token was chosen before")
    if "ignore_eos" in info.sampling:
        ignoring = msgspec.structs.replace(early, ignore_eos=True)
        found = one(bench, ignoring, prompt)
        require(found == end, "ignore_eos: an end token is one like any other, also early")
