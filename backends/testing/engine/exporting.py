"""Promises about KV that goes into the arena."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from backends.testing.desk import Bytes
from backends.testing.engine.bench import EngineBench
from backends.testing.engine.desk import CANARY, EngineDesk
from backends.testing.form import require


def places(desk: EngineDesk, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Which of its blocks has these positions of a job, and at which offset."""
    for position in range(start, end):
        yield divmod(position, desk.layout.block_tokens)


def _untouched(desk: EngineDesk, arena: list[Bytes], block: int, offset: int) -> bool:
    return any(bool((array[block, :, offset] == CANARY).all()) for array in arena)


def a_prefix_is_exported_whole(bench: EngineBench) -> None:
    """Each layer is told ready from the first position to the last, and lies in the arena."""
    desk = bench.needs("prefill")
    for prompt in bench.prompts():
        desk.fill()
        asked = desk.done(desk.prefill(prompt, bench.judged))
        desk.output(asked)
        reached = [0] * desk.layout.layers
        for start, end, layer in asked.story.ready:
            for one in range(desk.layout.layers) if layer is None else (layer,):
                require(
                    0 <= one < desk.layout.layers and reached[one] == start < end <= len(prompt),
                    f"ready: positions {start} to {end} in layer {one}, of which {reached[one]} of "
                    f"{len(prompt)} were told before; tell them in ascending order without a gap",
                )
                reached[one] = end
        require(
            min(reached) == len(prompt),
            f"ready: a layer was told to position {min(reached)} of {len(prompt)} before "
            "prefilled; tell all, the last and partial block too",
        )
        arena = desk.arena(asked.blocks)
        missing = [
            position
            for position, place in enumerate(places(desk, 0, len(prompt)))
            if _untouched(desk, arena, *place)
        ]
        require(
            not missing,
            f"arena: positions {missing[:5]} of a prefix of {len(prompt)} tokens were told ready "
            "and never written; export what the engine had already as well, and the last position",
        )
        desk.clear()


def without_blocks_nothing_is_exported(bench: EngineBench) -> None:
    """A prefix whose job names no blocks is computed all the same, and leaves the arena alone."""
    desk = bench.needs("prefill")
    prompt = bench.prompts(1)[0]
    exported = desk.output(desk.done(desk.prefill(prompt, bench.judged)))
    desk.fill()
    asked = desk.done(desk.prefill(prompt, bench.judged, export=False))
    require(
        desk.output(asked).sampled[0].token == exported.sampled[0].token,
        "prefilled: another token is sampled when nothing is exported",
    )
    _require_canary(desk, set(), "a job without blocks")


def what_is_ready_is_final(bench: EngineBench) -> None:
    """What lies in the arena when it is told ready is what lies there at the end."""
    desk = bench.needs("prefill")
    for prompt in bench.prompts(3):
        desk.fill()
        seen: list[list[Bytes]] = []
        blocks = desk.take(len(prompt))
        desk.ear.watch = lambda event, _job, seen=seen, blocks=blocks: (
            seen.append(desk.arena(blocks)) if event == "ready" else None
        )
        asked = desk.done(desk.prefill(prompt, bench.judged, blocks=blocks))
        last = desk.arena(blocks)
        for told, then in zip(asked.story.ready, seen, strict=True):
            _require_equal(desk, told, then, last)
        desk.clear()


def _require_equal(
    desk: EngineDesk,
    told: tuple[int, int, int | None],
    then: list[Bytes],
    last: list[Bytes],
) -> None:
    start, end, layer = told
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    for block, offset in places(desk, start, end):
        for before, after in zip(then, last, strict=True):
            require(
                np.array_equal(before[block, layers, offset], after[block, layers, offset]),
                f"ready: positions {start} to {end} changed in the arena after they were told "
                "ready; they are read and pushed at once, so copy first and tell then",
            )


def nothing_else_of_the_arena_is_touched(bench: EngineBench) -> None:
    """Blocks that no job names are neither written by a prefix nor by decoding."""
    desk = bench.desk
    prompt = bench.prompts(1)[0]
    used: set[int] = set()
    desk.fill()
    if "prefill" in desk.info.phases:
        used |= set(desk.done(desk.prefill(prompt, bench.judged)).blocks)
    if "decode" in desk.info.phases:
        desk.alone(prompt, 4, bench.judged)
    _require_canary(desk, used, "a job that does not name them")


def the_arena_is_left_alone_after_the_prefix(bench: EngineBench) -> None:
    """Once `prefilled` was told, the job writes no more to its blocks: others have them then."""
    desk = bench.needs("prefill")
    for prompt in bench.prompts(3):
        asked = desk.prefill(prompt, bench.judged)
        desk.until(asked, lambda it: it.outputs, "prefilled")
        desk.fill()
        desk.quiet()
        desk.end(asked)
        _require_canary(desk, set(), "a prefix that was done")
        desk.clear()


def _require_canary(desk: EngineDesk, but: set[int], who: str) -> None:
    kept = [block for block in range(desk.info.pool_blocks) if block not in but]
    for array in desk.arena(kept):
        touched = np.argwhere((array != CANARY).any(axis=(1, 2, 3)))
        require(
            not len(touched),
            f"arena: {len(touched)} blocks were written to by {who}; they hold the KV of others",
        )
