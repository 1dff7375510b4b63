"""Promises about what a step computes, whatever lies beside a row in its batch."""

from __future__ import annotations

from collections.abc import Sequence as Items

import msgspec
import numpy as np

from backends.api import Logprob, Row, Sampled
from backends.testing.alike import NOT_EXACT, Bounds, own_bounds, require_alike
from backends.testing.bench import STEPS
from backends.testing.desk import Desk, Line
from backends.testing.form import Broken, Unproven, require
from backends.testing.stepped.bench import SteppedBench

CHUNKS = (2, 7, 16)


def forced(desk: Desk, line: Line, tokens: Items[int], chunk: int = 1 << 20) -> list[Sampled]:
    """Prefill `line`, then decode along `tokens`: what is sampled after each of them but the last.

    The line's blocks are free afterwards.
    """
    desk.prefill(line, chunk)
    desk.force(line, tokens[:-1])
    desk.release(line)
    return line.sampled


def every_row_is_answered(bench: SteppedBench) -> None:
    """Each row has its output, in order: a known token for each sequence, logprobs as asked."""
    desk = bench.desk
    lines = [bench.line(prompt) for prompt in bench.prompts()]
    alone = [desk.run(line.sequence.prompt, 1, sampling=bench.judged)[0] for line in lines]
    rows = [desk.row(line, 0, len(line.tokens)) for line in lines]
    unsampled = bench.line([1 % desk.info.vocabulary] * 3)
    rows.insert(1, msgspec.structs.replace(desk.row(unsampled, 0, 3), sequences=()))
    outputs = desk.step(rows)
    del outputs[1]
    for output in outputs:
        (sampled,) = output.sampled
        token = sampled.token
        require(0 <= token < desk.info.vocabulary, f"step: token {token} is not in the vocabulary")
        _look_at_logprob(bench, sampled)
    together = [output.sampled[0] for output in outputs]
    message = "step: rows of one batch have each other's answers; keep their order"
    require_alike(together, alone, own_bounds(desk.info), message)


def _look_at_logprob(bench: SteppedBench, sampled: Sampled) -> None:
    wanted, found = bench.judged.logprobs, sampled.logprob
    if wanted is None:
        require(found is None, "step: a log probability that nobody asked for")
        return
    require(found is not None, "step: no log probability, though `logprobs` is declared")
    assert found is not None
    require(
        len(found.top) == wanted,
        f"step: {len(found.top)} likeliest tokens where logprobs={wanted} were asked for",
    )
    require(
        found.token == sampled.token, "step: the log probability is of another token than sampled"
    )


def a_prompt_in_chunks_is_the_same_prompt(bench: SteppedBench) -> None:
    """A prefix computed in chunks of any length is that computed at once."""
    desk = bench.desk
    for prompt in bench.prompts():
        whole = desk.run(prompt, STEPS, sampling=bench.judged)
        tokens = [it.token for it in whole]
        for chunk in CHUNKS:
            if chunk < len(prompt) and len(prompt) % chunk != 1:
                cut = forced(desk, bench.line(prompt), tokens, chunk)
                require_alike(
                    cut,
                    whole,
                    own_bounds(desk.info),
                    f"step: a prompt of {len(prompt)} tokens in chunks of {chunk} becomes another; "
                    "attend to what lies in the row's blocks before `start`, and to no later "
                    "position",
                )


def decoding_agrees_with_prefill(bench: SteppedBench) -> None:
    """Prefill of prompt and generated tokens gives what decoding them gave: `continuation`."""
    desk = bench.desk
    for prompt in bench.prompts():
        decoded = bench.line(prompt)
        desk.prefill(decoded)
        desk.decode([decoded], STEPS)
        again = bench.line(prompt)
        again.generated.extend(decoded.generated[:-1])
        desk.prefill(again)
        require_alike(
            again.sampled,
            decoded.sampled[-1:],
            own_bounds(desk.info),
            f"step: after a prompt of {len(prompt)} tokens, prefill of {STEPS} generated tokens is "
            "not what decoding them is",
        )
        if desk.info.continuation == "exact":
            require(
                _same_kv(desk, decoded, again, len(decoded.tokens) - 1),
                NOT_EXACT,
            )
        desk.release(decoded, again)


def _same_kv(desk: Desk, one: Line, other: Line, tokens: int) -> bool:
    size = desk.layout.block_tokens
    positions = np.arange(tokens)
    left, right = (np.array(line.blocks)[positions // size] for line in (one, other))
    return all(
        bool((array[left, :, positions % size] == array[right, :, positions % size]).all())
        for array in desk.snapshot()
    )


def a_batch_does_not_change_its_rows(bench: SteppedBench) -> None:
    """A row gives the same whatever else is in its batch: decode rows, chunks of other prompts."""
    desk = bench.desk
    prompts = bench.prompts()
    alone = [desk.run(prompt, STEPS, sampling=bench.judged) for prompt in prompts]
    lines = [bench.line(prompt) for prompt in prompts]
    together: list[list[Sampled]] = [[] for _ in lines]
    for turn in range(STEPS + len(lines) - 1):  # one more line joins at each step
        active = [it for it in range(len(lines)) if it <= turn and len(together[it]) < STEPS]
        rows = [_next_row(desk, lines[it], begun=bool(together[it])) for it in active]
        for it, output in zip(active, desk.step(rows), strict=True):
            together[it].append(output.sampled[0])
            lines[it].take(output.sampled[0], alone[it][len(together[it]) - 1].token)
    for prompt, ours, theirs in zip(prompts, together, alone, strict=True):
        require_alike(
            ours,
            theirs,
            own_bounds(desk.info),
            f"step: a prompt of {len(prompt)} tokens continues otherwise beside others; keep the "
            "rows of a batch apart",
        )
    desk.release(*lines)


def _next_row(desk: Desk, line: Line, *, begun: bool) -> Row:
    return desk.decode_row(line) if begun else desk.row(line, 0, len(line.tokens))


def sequences_share_a_prefix(bench: SteppedBench) -> None:
    """Several sequences of one row get a token each, and go on from shared blocks."""
    desk = bench.desk
    prompt = bench.prompts(1)[0]
    expected = desk.run(prompt, STEPS, sampling=bench.judged)
    line = bench.line(prompt)
    others = [bench.line(prompt) for _ in range(2)]
    row = msgspec.structs.replace(
        desk.row(line, 0, len(prompt)), sequences=tuple(it.sequence for it in (line, *others))
    )
    (output,) = desk.step([row])
    full = len(prompt) // desk.layout.block_tokens
    for it, sampled in zip((line, *others), output.sampled, strict=True):
        it.take(sampled)
    for other in others:
        other.blocks = line.blocks[:full]
        desk.cover(other, len(prompt))
        desk.copy_blocks(list(zip(line.blocks[full:], other.blocks[full:], strict=True)))
    desk.decode([line, *others], STEPS - 1)
    for it in (line, *others):
        require_alike(
            it.sampled,
            expected,
            own_bounds(desk.info),
            "step: sequences that share the blocks of a prefix do not go on like one alone; "
            "blocks before a row's `start` are read only, and may be in several rows of a batch",
        )
    for other in others:
        other.blocks = other.blocks[full:]
    desk.release(line, *others)


def prompt_logprobs_agree_with_decoding(bench: SteppedBench) -> None:
    """Log probabilities of a prompt's tokens are those that decoding along them gives."""
    desk = bench.desk
    if bench.judged.logprobs is None:
        raise Unproven("it does not declare `logprobs`")
    if not desk.info.prompt_logprobs:
        raise Unproven("info.prompt_logprobs is false, so nobody asks for them")
    if desk.info.emulated:
        raise Unproven("info.emulated: its log probabilities may be made up")
    prompt = bench.prompts(1)[0]
    along = forced(desk, bench.line(prompt[:1]), prompt[1:])
    line = bench.line(prompt)
    row = desk.row(line, 0, len(prompt))
    row = msgspec.structs.replace(row, prompt_logprobs=2, following=prompt[1:])
    (output,) = desk.step([row])
    desk.release(line)
    found = output.prompt_logprobs
    require(
        len(found) == len(prompt) - 1,
        f"step: {len(found)} prompt logprobs for {len(prompt) - 1} tokens of `following`",
    )
    bounds = own_bounds(desk.info)
    for position, (one, sampled) in enumerate(zip(found, along, strict=True)):
        _look_at_prompt_logprob(one, sampled, prompt[position + 1], position, bounds)


def _look_at_prompt_logprob(
    one: Logprob, sampled: Sampled, token: int, position: int, bounds: Bounds
) -> None:
    assert sampled.logprob is not None
    known = dict(sampled.logprob.top)
    require(one.token == token, f"step: prompt logprob {position} is not of `following`")
    require(len(one.top) == 2, f"step: {len(one.top)} alternatives where 2 were asked for")
    off = abs(one.logprob - known.get(token, one.logprob))
    if off > bounds.logit:
        rounded = bounds.roughly is not None and off <= bounds.roughly.logit
        raise Broken(
            NOT_EXACT
            if rounded
            else f"step: prompt logprob {position} is {one.logprob:.4f}, decoding says "
            f"{known[token]:.4f}"
        )
