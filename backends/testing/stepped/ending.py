"""Promises about work that stops: cancelled, failed, started again."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from backends.api import Row
from backends.testing.alike import own_bounds, require_alike
from backends.testing.bench import STEPS
from backends.testing.desk import Desk, Line
from backends.testing.form import Broken, Hangs, require
from backends.testing.stepped.bench import SteppedBench

POINTS = 8


def blocks_may_be_used_again(bench: SteppedBench) -> None:
    """KV is found by block and position alone: nothing is left of who had the blocks before."""
    desk = bench.desk
    prompts = [bench.prompts(1)[0], bench.prompts(1)[0][::-1]]
    lines = [bench.line(prompt) for prompt in prompts]
    for line in lines:
        desk.prefill(line)
        desk.decode([line], STEPS - 1)
    desk.release(*lines)
    for line in (*lines, *lines[::-1], *lines):  # in the same tables, in turn
        again = [desk.run(line.sequence.prompt, STEPS, sampling=bench.judged) for _ in range(2)]
        for found in again:
            require_alike(
                found,
                line.sampled,
                own_bounds(desk.info),
                "step: in blocks that were used before, a prompt becomes another; keep nothing "
                "about a block, a sequence or a table that the next step does not name",
            )


def a_cancel_at_any_point_disturbs_nobody(bench: SteppedBench) -> None:
    """A sequence may vanish after any step; others go on, and its blocks are given out at once."""
    desk = bench.desk
    prompts = bench.prompts(3)
    expected = [desk.run(prompt, STEPS, sampling=bench.judged) for prompt in prompts]
    victim_prompt, steady_prompt, next_prompt = prompts
    chunk = max(2, len(victim_prompt) // 3)
    for point in range(POINTS):
        steady = bench.line(steady_prompt)
        desk.prefill(steady)
        victim = bench.line(victim_prompt)
        for number, row in enumerate(_life(desk, victim, chunk)):
            if number == point:
                break
            outputs = desk.step([desk.decode_row(steady), row])
            steady.take(outputs[0].sampled[0], expected[1][len(steady.generated)].token)
            if outputs[1].sampled:
                victim.take(outputs[1].sampled[0])
        desk.release(victim)
        heir = desk.run(next_prompt, STEPS, sampling=bench.judged)
        while len(steady.generated) < STEPS:
            (output,) = desk.step([desk.decode_row(steady)])
            steady.take(output.sampled[0], expected[1][len(steady.generated)].token)
        desk.release(steady)
        for line, right in ((heir, expected[2]), (steady.sampled, expected[1])):
            require_alike(
                line,
                right,
                own_bounds(desk.info),
                f"step: a sequence that vanished after {point} of its steps changed another; a "
                "cancel is not told: forget what no row names",
            )


def _life(desk: Desk, line: Line, chunk: int) -> Iterator[Row]:
    """The rows of a prompt in chunks, then of what is decoded."""
    total = len(line.tokens)
    start = 0
    while start < total:
        end = total if total - start - chunk < 2 else start + chunk
        yield desk.row(line, start, end)
        start = end
    for _ in range(STEPS - 1):
        yield desk.decode_row(line)


def a_step_that_fails_loses_no_more_than_itself(bench: SteppedBench) -> None:
    """After a step that raised, the same rows are computed as if it had not been."""
    desk = bench.desk
    prompts = bench.prompts(2)
    expected = [desk.run(prompt, STEPS, sampling=bench.judged) for prompt in prompts]
    bad = Row(tokens=[0, 0], start=0, blocks=[desk.info.pool_blocks])
    lines = [bench.line(prompt) for prompt in prompts]
    for line in lines:
        good = desk.row(line, 0, len(line.tokens))
        _failing(desk, [good, bad])
        (output,) = desk.step([good])
        line.take(output.sampled[0])
    for number in range(1, STEPS):
        rows = [desk.decode_row(line) for line in lines]
        _failing(desk, [rows[0], bad, rows[1]])
        for line, output, right in zip(lines, desk.step(rows), expected, strict=True):
            line.take(output.sampled[0], right[number].token)
    desk.release(*lines)
    for line, right in zip(lines, expected, strict=True):
        require_alike(
            line.sampled,
            right,
            own_bounds(desk.info),
            "step: after a step that raised, the next one computes something else; put back what "
            "a failed step has changed",
        )


def _failing(desk: Desk, rows: list[Row]) -> None:
    try:
        desk.step(rows)
    except (Broken, Hangs):
        raise
    except Exception:
        return
    raise Broken("step: a row with a block beyond the pool was computed; raise StepFailed")


def made_again_it_computes_the_same(bench: SteppedBench) -> None:
    """Closed and constructed again in one process, it states and computes what it did."""
    prompts = bench.prompts(3)
    info = bench.desk.info
    before = [bench.desk.run(prompt, STEPS, sampling=bench.judged) for prompt in prompts]
    desk = bench.renew()
    require(
        msgspec.to_builtins(desk.info) == msgspec.to_builtins(info),
        "info: constructed again it states something else; workers would refuse each other",
    )
    for prompt, right in zip(prompts, before, strict=True):
        require_alike(
            desk.run(prompt, STEPS, sampling=bench.judged),
            right,
            own_bounds(desk.info),
            "close: constructed again it computes something else",
        )
