"""Promises about the choice of tokens, in prefixes as in sequences, and about log probabilities."""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import wraps

import msgspec

from backends.api import Logprob, Sampled
from backends.testing.alike import Bounds, bounds_of, require_alike
from backends.testing.bench import STEPS
from backends.testing.choosing import SAMPLING
from backends.testing.choosing.asking import Chooser
from backends.testing.desk import Desk, Line
from backends.testing.engine.bench import EngineBench
from backends.testing.engine.desk import Asked
from backends.testing.form import Broken, Promise, Unproven, require

PROMPTS = 3
LIKELIEST = 20
"""So many tokens of each position are compared one by one: as many as a client may ask for."""


def in_each_phase(promise: Promise[Chooser]) -> Promise[EngineBench]:
    """The promise, asked of jobs of each phase that the engine does."""

    @wraps(promise)
    def look(bench: EngineBench) -> None:
        unproven: list[Unproven] = []
        phases = sorted(bench.info.phases)
        for phase in phases:
            bench.chooses_in = phase
            try:
                promise(bench)
            except Unproven as error:
                unproven.append(error)
            except Broken as error:  # or that it hangs: nothing more can be asked of it then
                raise type(error)(f"{error} (asked in {phase} jobs)") from error
        if len(unproven) == len(phases):
            raise unproven[0]

    return look


CHOOSING: tuple[Promise[EngineBench], ...] = tuple(in_each_phase(it) for it in SAMPLING)


def logprobs_agree_with_the_reference(bench: EngineBench) -> None:
    """After the reference's words, log probabilities are those that the reference gives."""
    reference = bench.reference
    if bench.judged.logprobs is None:
        raise Unproven("it does not declare `logprobs`")
    bounds = bounds_of(bench.info.layout, reference.layout)
    for prompt in bench.prompts(PROMPTS):
        theirs = reference.run(prompt, STEPS, sampling=bench.judged)
        for phase in sorted(bench.info.phases):
            bench.chooses_in = phase
            ours = _along(bench, prompt, theirs)
            _require_equal(ours, theirs[: len(ours)], bounds)


def _along(bench: EngineBench, prompt: Items[int], text: Items[Sampled]) -> list[Sampled]:
    """What it says after each token of a text, or at least after the prompt."""
    tokens = [it.token for it in text]
    return [
        bench.choose(bench.judged, prompt, tokens[:at])[0]
        for at in range(len(tokens) if bench.goes_on else 1)
    ]


def _require_equal(ours: list[Sampled], theirs: list[Sampled], bounds: Bounds) -> None:
    otherwise = "logprobs: they are not the reference's; they are natural, and of raw logits"
    require_alike(ours, theirs, bounds, otherwise)
    for position, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.logprob is None or other.logprob is None:
            raise Broken(f"logprobs: none at position {position}")
        found = dict(one.logprob.top)
        for token, value in other.logprob.top[:LIKELIEST]:
            require(
                abs(found.get(token, value) - value) <= bounds.logit,
                f"logprobs: {found.get(token, value):.4f} of token {token} at position {position}, "
                f"{value:.4f} by the reference; the bound for {bounds.name} is {bounds.logit:g}",
            )


def prompt_logprobs_are_given_as_declared(bench: EngineBench) -> None:
    """Where `info.prompt_logprobs` says so, every token of a prompt but the first has its own."""
    for prompt in bench.prompts(PROMPTS):
        for scores in _scores(bench, prompt):
            found = [it.token for it in scores]
            require(
                found == prompt[1:],
                f"prefilled: prompt_logprobs are of {len(found)} tokens, and not of those of the "
                f"prompt after its first, which are {len(prompt) - 1}",
            )
        bench.desk.clear()


def _scores(bench: EngineBench, prompt: list[int]) -> list[tuple[Logprob, ...]]:
    """Log probabilities of a prompt, with two alternatives each, from a job of each phase.

    Raises:
        Unproven: it gives none.
    """
    desk = bench.desk
    if not desk.info.prompt_logprobs:
        raise Unproven("info.prompt_logprobs: it says that it gives none")
    jobs: list[Asked] = []
    if "prefill" in desk.info.phases:
        jobs.append(desk.prefill(prompt, bench.judged, scores=2))
    if "decode" in desk.info.phases:
        jobs.append(desk.decode(prompt, (), bench.judged, scores=2))
    for asked in jobs:
        desk.until(asked, lambda it: it.outputs, "prefilled")
        desk.abort(asked)
        desk.end(asked)
    return [asked.story.outputs[0].prompt_logprobs for asked in jobs]


def prompt_logprobs_agree_with_the_reference(bench: EngineBench) -> None:
    """Log probabilities of a prompt's tokens are those that the reference engine gives."""
    reference = bench.reference
    if not reference.info.prompt_logprobs:
        raise Unproven("the reference engine gives no log probabilities of a prompt")
    bounds = bounds_of(bench.info.layout, reference.layout)
    for prompt in bench.prompts(PROMPTS):
        right = _scores_of(reference, prompt)
        for scores in _scores(bench, prompt):
            for position, (one, other) in enumerate(zip(scores, right, strict=True)):
                require(
                    abs(one.logprob - other.logprob) <= bounds.logit,
                    f"prompt_logprobs: {one.logprob:.4f} of token {position + 1}, "
                    f"{other.logprob:.4f} by the reference; the bound for {bounds.name} is "
                    f"{bounds.logit:g}",
                )
        bench.desk.clear()


def _scores_of(reference: Desk, prompt: list[int]) -> tuple[Logprob, ...]:
    line = Line(prompt)
    row = reference.row(line, 0, len(prompt))
    row = msgspec.structs.replace(row, prompt_logprobs=2, following=prompt[1:])
    (output,) = reference.step([row])
    reference.release(line)
    return output.prompt_logprobs
