"""Promises about the choice of tokens: each parameter that is declared does what `Sampling` says.

What is asked for is chosen so that the right answer is known whatever the model: a penalty or bias
of a hundred outweighs every logit, a temperature of a hundred makes all tokens about equally
likely. Many sequences of one row are as many draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

import msgspec

from backends.api import Sampled, Sampling, Sequence
from backends.testing.alike import MOST_ALTERNATIVES
from backends.testing.bench import SteppedBench
from backends.testing.desk import GREEDY, Line
from backends.testing.form import Promise, Unproven, require

DRAWS = 48
FLAT = 100.0
STRONG = 100.0
CONTEXTS = 16
SLACK = 1e-3


def draw(
    bench: SteppedBench,
    sampling: Sampling,
    prompt: Items[int],
    generated: Items[int] = (),
    seeds: Items[int] = (0,),
) -> list[Sampled]:
    """What is sampled after prompt and generated tokens, once for each seed."""
    desk = bench.desk
    line = Line(prompt, sampling)
    line.generated.extend(generated)
    row = desk.row(line, 0, len(line.tokens))
    sequences = tuple(
        Sequence(prompt=list(prompt), generated=list(generated), sampling=sampling, seed=seed)
        for seed in seeds
    )
    (output,) = desk.step([msgspec.structs.replace(row, sequences=sequences)])
    desk.release(line)
    return list(output.sampled)


def one(
    bench: SteppedBench, sampling: Sampling, prompt: Items[int], generated: Items[int] = ()
) -> int:
    """The one token that is sampled."""
    return draw(bench, sampling, prompt, generated)[0].token


def plain(bench: SteppedBench, prompt: Items[int], generated: Items[int] = ()) -> int:
    """The likeliest token."""
    return one(bench, GREEDY, prompt, generated)


def likely(
    bench: SteppedBench, prompt: Items[int], temperature: float = 1.0
) -> list[tuple[int, float]]:
    """Tokens and their probabilities at that temperature, likeliest first.

    Raises:
        Unproven: it gives no log probabilities of the whole vocabulary.
    """
    judged = bench.judged
    if judged.logprobs is None or judged.logprobs < bench.desk.info.vocabulary:
        raise Unproven(
            "that takes the log probabilities of a whole vocabulary: `logprobs` of up to"
            f" {MOST_ALTERNATIVES} tokens, on a model that has no more (--tiny-model)"
        )
    (sampled,) = draw(bench, judged, prompt)
    assert sampled.logprob is not None
    weights = [(token, math.exp(value / temperature)) for token, value in sampled.logprob.top]
    total = sum(weight for _, weight in weights)
    return [(token, weight / total) for token, weight in weights]


def declared(bench: SteppedBench, *names: str) -> None:
    """Make sure that it declares these parameters, and that its tokens follow from logits.

    Raises:
        Unproven: it does not.
    """
    missing = [name for name in names if name not in bench.desk.info.sampling]
    if missing:
        raise Unproven(f"it does not declare `{missing[0]}`, so requests that set it go elsewhere")
    if bench.desk.info.emulated:
        raise Unproven("info.emulated: its tokens may be made up")


def contexts(bench: SteppedBench) -> Iterator[list[int]]:
    """Some prompts of a dozen tokens, none of them twice in one."""
    vocabulary = bench.desk.info.vocabulary
    length = min(12, vocabulary // 4, bench.desk.info.context_tokens // 4)
    for number in range(CONTEXTS):
        yield [(number * 131 + it * 17 + 3) % vocabulary for it in range(length)]


def context(bench: SteppedBench) -> list[int]:
    """The first of them."""
    return next(contexts(bench))


def temperature_is_honoured(bench: SteppedBench) -> None:
    """0 is the likeliest token; the higher, the more tokens are drawn, as often as they should."""
    declared(bench, "temperature")
    prompt = context(bench)
    best = plain(bench, prompt)
    require(
        all(one(bench, GREEDY, prompt) == best for _ in range(3)),
        "temperature: 0 gives now one token, now another; it is the likeliest",
    )
    cold = draw(bench, Sampling(temperature=1e-4), prompt, seeds=range(DRAWS))
    require(
        _share(cold, best) > 0.9,
        "temperature: near 0 tokens other than the likeliest are drawn; divide the logits by it",
    )
    hot = draw(bench, Sampling(temperature=FLAT), prompt, seeds=range(DRAWS))
    kinds = len({it.token for it in hot})
    expected = min(DRAWS, bench.desk.info.vocabulary)
    require(
        kinds > expected // 3,
        f"temperature: at {FLAT:.0f} only {kinds} kinds of tokens in {DRAWS} draws; divide the "
        "logits by it",
    )
    _require_frequencies(bench, prompt)


def _require_frequencies(bench: SteppedBench, prompt: list[int]) -> None:
    """At a middling temperature the likelier half of the weight is drawn half of the times."""
    middling = 2.0
    try:
        ranked = likely(bench, prompt, middling)
    except Unproven:
        return
    half: set[int] = set()
    weight = 0.0
    for token, share in ranked:
        if weight >= 0.5:
            break
        half.add(token)
        weight += share
    count = 4 * DRAWS
    drawn = draw(bench, Sampling(temperature=middling), prompt, seeds=range(count))
    share = sum(it.token in half for it in drawn) / count
    spread = 4 * math.sqrt(max(weight * (1 - weight), 1e-4) / count)
    require(
        abs(share - weight) <= spread + SLACK,
        f"temperature: at {middling} tokens of weight {weight:.2f} were drawn {share:.0%} of the "
        "times; the distribution is softmax(logits / temperature)",
    )


def _share(drawn: list[Sampled], token: int) -> float:
    return sum(it.token == token for it in drawn) / len(drawn)


def top_k_is_honoured(bench: SteppedBench) -> None:
    """Only the `top_k` likeliest tokens are drawn, each of them."""
    declared(bench, "top_k", "temperature")
    prompt = context(bench)
    best = plain(bench, prompt)
    first = draw(bench, Sampling(temperature=FLAT, top_k=1), prompt, seeds=range(DRAWS))
    require(_share(first, best) == 1, "top_k: 1 draws other tokens than the likeliest")
    allowed = {token for token, _ in likely(bench, prompt)[:3]}
    drawn = {
        it.token
        for it in draw(bench, Sampling(temperature=FLAT, top_k=3), prompt, seeds=range(DRAWS))
    }
    require(drawn == allowed, f"top_k: 3 draws {sorted(drawn)} of {sorted(allowed)}")


def top_p_is_honoured(bench: SteppedBench) -> None:
    """Only the fewest likeliest tokens that reach `top_p` are drawn, after temperature."""
    declared(bench, "top_p", "temperature")
    prompt = context(bench)
    best = plain(bench, prompt)
    first = draw(bench, Sampling(temperature=FLAT, top_p=1e-6), prompt, seeds=range(DRAWS))
    require(_share(first, best) == 1, "top_p: next to 0 draws other tokens than the likeliest")
    temperature, top_p = 4.0, 0.5
    allowed, reached = set(), 0.0
    for token, share in likely(bench, prompt, temperature):
        if reached >= top_p + SLACK:
            break
        allowed.add(token)
        reached += share
    wanted = Sampling(temperature=temperature, top_p=top_p)
    drawn = {it.token for it in draw(bench, wanted, prompt, seeds=range(2 * DRAWS))}
    require(
        drawn <= allowed,
        f"top_p: {top_p} at temperature {temperature} draws {len(drawn - allowed)} tokens beyond "
        "the nucleus; it applies after temperature",
    )
    require(
        len(allowed) < 4 or len(drawn) > 1,
        f"top_p: {top_p} draws one token only where {len(allowed)} are in the nucleus",
    )


def min_p_is_honoured(bench: SteppedBench) -> None:
    """Only tokens at least `min_p` times as likely as the likeliest are drawn."""
    declared(bench, "min_p", "temperature")
    prompt = context(bench)
    best = plain(bench, prompt)
    first = draw(bench, Sampling(temperature=FLAT, min_p=1.0), prompt, seeds=range(DRAWS))
    require(_share(first, best) == 1, "min_p: 1 draws other tokens than the likeliest")
    temperature, min_p = 4.0, 0.5
    ranked = likely(bench, prompt, temperature)
    allowed = {token for token, share in ranked if share >= min_p * ranked[0][1] - SLACK}
    wanted = Sampling(temperature=temperature, min_p=min_p)
    drawn = {it.token for it in draw(bench, wanted, prompt, seeds=range(2 * DRAWS))}
    require(
        drawn <= allowed,
        f"min_p: {min_p} draws {len(drawn - allowed)} tokens that are less likely than that",
    )
    require(
        len(allowed) < 4 or len(drawn) > 1,
        f"min_p: {min_p} draws one token only where {len(allowed)} are likely enough",
    )


def repetition_penalty_is_honoured(bench: SteppedBench) -> None:
    """Tokens of prompt and generated text are less likely above 1, more likely below."""
    declared(bench, "repetition_penalty", "temperature")
    more = Sampling(temperature=0.0, repetition_penalty=1e-6)
    less = Sampling(temperature=0.0, repetition_penalty=1e6)
    looked = favoured = avoided = 0
    for prompt in contexts(bench):
        for split in (len(prompt), 1):
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


def presence_penalty_is_honoured(bench: SteppedBench) -> None:
    """It is subtracted from tokens that were generated, however often, and from no others."""
    declared(bench, "presence_penalty", "temperature")
    _require_additive(bench, "presence_penalty", _presence)


def _presence(context: list[int]) -> Iterator[tuple[list[int], list[int], set[int]]]:
    """Prompt, generated tokens, and which of those a bonus may favour."""
    yield context, context[:1], {context[0]}
    yield context[1:], [context[0]], {context[0]}


def frequency_penalty_is_honoured(bench: SteppedBench) -> None:
    """It is subtracted from generated tokens as often as they were, and from no others."""
    declared(bench, "frequency_penalty", "temperature")
    _require_additive(bench, "frequency_penalty", _frequency)


def _frequency(context: list[int]) -> Iterator[tuple[list[int], list[int], set[int]]]:
    yield context, context[:1], {context[0]}
    first, second = context[:2]
    yield context, [first, second, second], {second}
    yield context, [second, first, first], {first}


def _require_additive(
    bench: SteppedBench,
    name: str,
    cases: Callable[[list[int]], Iterator[tuple[list[int], list[int], set[int]]]],
) -> None:
    for number, some in zip(range(4), contexts(bench), strict=False):
        for prompt, generated, right in cases(some):
            bonus = msgspec.convert({"temperature": 0.0, name: -STRONG}, Sampling)
            found = one(bench, bonus, prompt, generated)
            require(
                found in right,
                f"{name}: {-STRONG:.0f} after the generated tokens {generated} gives token "
                f"{found}, not {right} (context {number}); subtract it from the logits of "
                "generated tokens, before anything else",
            )
            best = plain(bench, prompt, generated)
            malus = msgspec.convert({"temperature": 0.0, name: STRONG}, Sampling)
            found = one(bench, malus, prompt, generated)
            require(
                found not in generated and (best in generated or found == best),
                f"{name}: {STRONG:.0f} after the generated tokens {generated} gives token {found}",
            )


def logit_bias_is_honoured(bench: SteppedBench) -> None:
    """It is added to the logits of its tokens before anything else; ids beyond have no effect."""
    declared(bench, "logit_bias", "temperature")
    vocabulary = bench.desk.info.vocabulary
    prompt = context(bench)
    best = plain(bench, prompt)
    other = (best + 7) % vocabulary
    for bias, right in (
        ({other: STRONG}, [other]),
        ({best: -STRONG, vocabulary - 1: 0.0}, [it for it in range(vocabulary) if it != best]),
        ({vocabulary + 5: STRONG}, [best]),
    ):
        found = one(bench, Sampling(temperature=0.0, logit_bias=bias), prompt)
        require(found in right, f"logit_bias: {bias} gives token {found}")
    if "logprobs" in bench.desk.info.sampling:
        wanted = Sampling(temperature=0.0, logit_bias={other: STRONG}, logprobs=1)
        (sampled,) = draw(bench, wanted, prompt)
        require(
            sampled.logprob is not None and sampled.logprob.top[0][0] == best,
            "logprobs: they are those of the raw logits, before bias and penalties",
        )


def logprobs_are_honoured(bench: SteppedBench) -> None:
    """As many of the likeliest tokens as asked for, best first, with log probabilities."""
    info = bench.desk.info
    if "logprobs" not in info.sampling:
        raise Unproven("it does not declare `logprobs`")
    prompt = context(bench)
    for count in (0, 1, 5):
        count = min(count, info.vocabulary)
        (sampled,) = draw(bench, Sampling(temperature=0.0, logprobs=count), prompt)
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
        if count:
            require(
                abs(found.logprob - values[0]) <= SLACK,
                "logprobs: the greedy token is not as likely as the likeliest",
            )
    (sampled,) = draw(bench, GREEDY, prompt)
    require(sampled.logprob is None, "logprobs: None asks for none, not even the token's own")
    if not info.emulated and bench.judged.logprobs == info.vocabulary:
        total = sum(share for _, share in _raw(bench, prompt))
        require(
            abs(total - 1) < 0.02,
            f"logprobs: the probabilities of the whole vocabulary add up to {total:.3f}",
        )


def _raw(bench: SteppedBench, prompt: list[int]) -> list[tuple[int, float]]:
    (sampled,) = draw(bench, bench.judged, prompt)
    assert sampled.logprob is not None
    return [(token, math.exp(value)) for token, value in sampled.logprob.top]


def min_tokens_is_honoured(bench: SteppedBench) -> None:
    """No end token and no stop id is chosen before so many were generated."""
    info = bench.desk.info
    if not {"min_tokens", "stop_token_ids"} <= info.sampling:
        raise Unproven("it does not declare `min_tokens` and `stop_token_ids`")
    prompt = context(bench)
    best = plain(bench, prompt)
    for generated, wanted, banned in (
        ([], 1, True),
        ([], 0, False),
        ([prompt[0]], 2, True),
        ([prompt[0]], 1, False),
    ):
        best = plain(bench, prompt, generated)
        sampling = Sampling(temperature=0.0, stop_token_ids=(best,), min_tokens=wanted)
        found = one(bench, sampling, prompt, generated)
        require(
            (found != best) is banned,
            f"min_tokens: {wanted} after {len(generated)} generated tokens, a stop id "
            f"{'was' if banned else 'was not'} chosen; count generated tokens, not the prompt's",
        )
    if not info.end_tokens or info.emulated or "logit_bias" not in info.sampling:
        return
    end = info.end_tokens[0]
    bias = {end: STRONG}
    early = Sampling(temperature=0.0, logit_bias=bias, min_tokens=1)
    require(one(bench, early, prompt) != end, "min_tokens: an end token was chosen before")
    if "ignore_eos" in info.sampling:
        ignoring = msgspec.structs.replace(early, ignore_eos=True)
        found = one(bench, ignoring, prompt)
        require(found == end, "ignore_eos: an end token is one like any other, also early")


SAMPLING: tuple[Promise[SteppedBench], ...] = (
    temperature_is_honoured,
    top_k_is_honoured,
    top_p_is_honoured,
    min_p_is_honoured,
    repetition_penalty_is_honoured,
    presence_penalty_is_honoured,
    frequency_penalty_is_honoured,
    logit_bias_is_honoured,
    logprobs_are_honoured,
    min_tokens_is_honoured,
)
