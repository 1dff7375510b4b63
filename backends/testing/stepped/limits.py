"""Promises about how much it holds, how far it reads, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from backends.api import Row
from backends.testing.alike import own_bounds, require_alike
from backends.testing.desk import GREEDY, Desk, Line
from backends.testing.form import Broken, Hangs, Unproven, require
from backends.testing.stepped.bench import SteppedBench

MOST_TOKENS = 8192
"""What the kit is ready to compute for one promise."""

LINES = 12
LOOKED_AT = 4


def it_holds_what_it_states(bench: SteppedBench) -> None:
    """Every block of the pool holds KV at once: `pool_blocks` is its capacity."""
    desk = bench.desk
    size, blocks = desk.layout.block_tokens, desk.info.pool_blocks
    _require_small("pool", blocks * size, "pool_tokens")
    each = min(-(-blocks // LINES), (desk.info.context_tokens - 1) // size)
    dice = np.random.default_rng(blocks)
    lines: list[Line] = []
    while desk.free:
        mine = min(each, len(desk.free)) * size - 1
        line = bench.line(dice.integers(0, desk.info.vocabulary, max(1, mine)).tolist())
        desk.prefill(line)
        lines.append(line)
    for line in lines:
        if len(line.tokens) <= len(line.blocks) * size:
            desk.decode([line], 1)
    desk.release(*lines)
    for line in lines:
        alone = desk.run(line.sequence.prompt, len(line.sampled), sampling=bench.judged)
        require_alike(
            line.sampled,
            alone,
            own_bounds(desk.info),
            f"info.pool_blocks: with all {blocks} blocks in use a sequence becomes another; state "
            "what there is, and keep no block for yourself",
        )


def it_reads_to_the_end_of_its_context(bench: SteppedBench) -> None:
    """The last position of `context_tokens` is computed like any other."""
    desk = bench.desk
    context = desk.info.context_tokens
    _require_small("context", context, "context_tokens")
    prompt = np.random.default_rng(context).integers(0, desk.info.vocabulary, context).tolist()
    line, whole = bench.line(prompt[:-1]), bench.line(prompt[:-1])
    desk.prefill(line)
    line.generated[-1] = prompt[-1]
    desk.decode([line], 1)
    desk.release(line)
    whole.generated.append(prompt[-1])
    desk.prefill(whole)
    desk.release(whole)
    require_alike(
        line.sampled[-1:],
        whole.sampled,
        own_bounds(desk.info),
        f"info.context_tokens: at position {context - 1} decoding is not what prefill is; state "
        "how far it reads",
    )


def a_full_batch_is_computed(bench: SteppedBench) -> None:
    """A step of `max_batch` rows is computed, each as alone."""
    desk = bench.desk
    rows = min(desk.info.max_batch, desk.info.pool_blocks)
    _require_small("batch", rows, "max_batch")
    bench.judged  # noqa: B018 -- it must be greedy
    dice = np.random.default_rng(rows)
    prompts = dice.integers(0, desk.info.vocabulary, (rows, 1)).tolist()
    lines = [Line(prompt, GREEDY) for prompt in prompts]
    batch = [desk.row(line, 0, 1) for line in lines]
    for line, output in zip(lines, desk.step(batch), strict=True):
        line.take(output.sampled[0])
    if desk.layout.block_tokens > 1:
        desk.decode(lines, 1)
    desk.release(*lines)
    for line in _some(lines):
        alone = desk.run(line.sequence.prompt, len(line.sampled), sampling=bench.judged)
        same = sum(one.token == other.token for one, other in zip(line.sampled, alone, strict=True))
        require(
            same >= own_bounds(desk.info).top1 * len(alone) - 1,
            f"info.max_batch: in a step of {rows} rows, a row is not what it is alone; state the "
            "largest step that it computes",
        )


def it_refuses_what_is_beyond_it(bench: SteppedBench) -> None:
    """A row that names a block, position or token beyond what it states fails its step."""
    desk = bench.desk
    for what, row in _beyond(desk):
        before = desk.snapshot()
        try:
            desk.step([row])
        except Hangs:
            raise
        except Broken as error:
            raise Broken(f"step: a row with {what} was answered: {error}") from error
        except Exception:
            others = [it for it in range(desk.info.pool_blocks) if it not in row.blocks]
            unharmed = all(
                np.array_equal(old[others], new[others])
                for old, new in zip(before, desk.snapshot(), strict=True)
            )
            require(
                unharmed,
                f"step: a row with {what} was refused, but blocks of others had changed by then; "
                "look before you write",
            )
            continue
        raise Broken(f"step: a row with {what} was computed; raise StepFailed")


def _beyond(desk: Desk) -> Iterator[tuple[str, Row]]:
    info, size = desk.info, desk.layout.block_tokens
    yield "a block beyond the pool", Row(tokens=[0, 0], start=0, blocks=[info.pool_blocks])
    yield "block -1", Row(tokens=[0, 0], start=0, blocks=[-1])
    yield "a token beyond the vocabulary", Row(tokens=[0, info.vocabulary], start=0, blocks=[0])
    yield "token -1", Row(tokens=[0, -1], start=0, blocks=[0])
    yield "positions that its blocks do not cover", Row(tokens=[0] * 2, start=size - 1, blocks=[0])
    end = info.context_tokens
    blocks = [it % info.pool_blocks for it in range(desk.layout.blocks_for(end + 1))]
    yield "a position beyond the context", Row(tokens=[0, 0], start=end - 1, blocks=blocks)


def _some(lines: list[Line]) -> list[Line]:
    return lines[:: max(1, len(lines) // LOOKED_AT)]


def _require_small(what: str, count: int, option: str) -> None:
    if count > MOST_TOKENS:
        raise Unproven(
            f"the {what} is of {count}, more than the {MOST_TOKENS} that the kit fills; give it "
            f"a smaller one for this (for example with {option})"
        )
