"""Promises about memory: which of the pool's bytes a plug-in writes, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from backends.testing.alike import own_bounds, require_alike
from backends.testing.bench import STEPS
from backends.testing.desk import Bytes, Desk, Line
from backends.testing.form import require
from backends.testing.stepped.bench import SteppedBench

WATCH_SECONDS = 0.05
"""How long the pool is watched after a step for what still comes."""

Mask = NDArray[np.bool_]


def it_writes_only_where_its_rows_lie(bench: SteppedBench) -> None:
    """A step writes to no block but those of its rows' positions, and to nothing before them."""
    desk = bench.desk
    size = desk.layout.block_tokens
    other = bench.line(bench.prompts(1)[0])
    desk.prefill(other)
    line = bench.line(bench.prompts(2)[0])
    chunk = size + size // 2 + 1
    for start in range(0, len(line.tokens), chunk):
        end = min(start + chunk, len(line.tokens))
        row = desk.row(line, start, end)
        _require_kept(desk, [(line, start, end)], lambda row=row: desk.step([row]))  # type: ignore[misc]
    line.generated.append(1 % desk.info.vocabulary)
    for _ in range(STEPS):
        rows = [desk.decode_row(it) for it in (line, other)]
        spans = [(it, len(it.tokens) - 1, len(it.tokens)) for it in (line, other)]
        _require_kept(desk, spans, lambda rows=rows: desk.step(rows))  # type: ignore[misc]
        for it in (line, other):
            it.generated.append(1 % desk.info.vocabulary)
    desk.release(line, other)


def _require_kept(
    desk: Desk, spans: list[tuple[Line, int, int]], act: Callable[[], object]
) -> None:
    """Nothing changes in the pool but from position `start` of these lines to the block's end."""
    size = desk.layout.block_tokens
    before = desk.snapshot()
    act()
    after = desk.snapshot()
    for old, new in zip(before, after, strict=True):
        changed: Mask = (old != new).any(axis=(1, 3))  # [block, token]
        for line, start, end in spans:
            for index in range(start // size, desk.layout.blocks_for(end)):
                changed[line.blocks[index], max(0, start - index * size) :] = False
        strays = np.argwhere(changed)
        if len(strays):
            block, token = (int(it) for it in strays[0])
            mine = [line.blocks.index(block) for line, _, _ in spans if block in line.blocks]
            where = f"its block {mine[0]}, before its start" if mine else "a block of nobody's"
            require(
                False,
                f"step: it wrote to block {block} at token {token} ({where}); write the row's "
                "positions only, and see that info.layout.axes and block_tokens are the pool's",
            )


def every_position_is_written_in_every_layer(bench: SteppedBench) -> None:
    """After a step the KV of its positions lies in the pool, in every layer, where it is stated."""
    desk = bench.desk
    size = desk.layout.block_tokens
    line = bench.line(bench.prompts(1)[0])
    desk.cover(line, len(line.tokens))
    for pool in desk.pools:
        for region in pool.regions:
            region[:] = 0x55
    desk.ingest(list(range(desk.info.pool_blocks)))
    desk.prefill(line)
    positions = np.arange(len(line.sequence.prompt))
    blocks = np.array(line.blocks)[positions // size]
    for array in desk.snapshot():
        untouched = (array[blocks, :, positions % size] == 0x55).all(axis=2)  # [position, layer]
        for layer in range(desk.layout.layers):
            untouched[: desk.layout.kept(layer, len(positions)), layer] = False
        found = np.argwhere(untouched)
        if len(found):
            position, layer = (int(it) for it in found[0])
            require(
                False,
                f"pool: the KV of position {position} in layer {layer} is not where info.layout "
                "says, or not brought to host memory before `step` returns",
            )
    desk.release(line)


def garbage_in_the_pool_does_no_harm(bench: SteppedBench) -> None:
    """Numbers that nobody has computed, NaN too, change nothing: they are masked or cleared."""
    desk = bench.desk
    prompts = bench.prompts()
    expected = [desk.run(prompt, STEPS, sampling=bench.judged) for prompt in prompts]
    for prompt, right in zip(prompts, expected, strict=True):
        for pool in desk.pools:
            for region in pool.regions:
                region[:] = 0xFF
        desk.ingest(list(range(desk.info.pool_blocks)))
        require_alike(
            desk.run(prompt, STEPS, sampling=bench.judged),
            right,
            own_bounds(desk.info),
            "step: what was left in the pool changes a text; a weight of zero times NaN is NaN: "
            "clear the rest of a block when a sequence begins to write there, or read less",
        )


def nothing_is_written_after_a_step(bench: SteppedBench) -> None:
    """Once `step`, `ingest` or `copy_blocks` has returned, the pool stays as it is."""
    desk = bench.desk
    line = bench.line(bench.prompts(1)[0])
    spare = bench.line(line.tokens)
    desk.cover(spare, len(line.tokens))
    for name, act in (
        ("step", lambda: desk.prefill(line)),
        ("step", lambda: desk.decode([line], 1)),
        ("ingest", lambda: desk.ingest(line.blocks)),
        ("copy_blocks", lambda: desk.copy_blocks([(line.blocks[0], spare.blocks[0])])),
    ):
        act()
        _require_still(desk, name)
    desk.release(line, spare)


def _require_still(desk: Desk, name: str) -> None:
    """Watch the pool, without looking away, for `WATCH_SECONDS`."""
    before = desk.snapshot()
    threading.Event().wait(WATCH_SECONDS)
    still = all(map(np.array_equal, before, desk.snapshot()))
    require(
        still,
        f"{name}: the pool changed after it had returned; the host may have given the blocks to "
        "somebody else by then: wait for the device",
    )


def a_layer_that_is_ready_is_final(bench: SteppedBench) -> None:
    """What `ready` reports is a layer of a row of the batch, from the step thread, and final."""
    desk = bench.desk
    lines = [bench.line(prompt) for prompt in bench.prompts(3)]
    rows = [desk.row(line, 0, len(line.tokens)) for line in lines]
    reports: list[tuple[int, int, list[Bytes]]] = []
    strange: list[str] = []
    thread = desk.thread.call(threading.get_ident)
    open_ = True

    def ready(row: int, layer: int) -> None:
        if not open_:
            strange.append("it was called after the step")
        elif threading.get_ident() != thread:
            strange.append("it was called from another thread than the step's")
        elif not (0 <= row < len(rows) and 0 <= layer < desk.layout.layers):
            strange.append(f"there is no layer {layer} of row {row}")
        else:
            reports.append((row, layer, _kv(desk, lines[row], layer)))

    desk.step(rows, ready)
    open_ = False
    _require_still(desk, "step")
    require(not strange, f"ready: {strange[0] if strange else ''}")
    for row, layer, seen in reports:
        final = _kv(desk, lines[row], layer)
        require(
            all(map(np.array_equal, seen, final)),
            f"ready: layer {layer} of row {row} was reported before its KV was final; the host "
            "sends it at once, so another worker would get what is not there yet",
        )
    desk.release(*lines)


def _kv(desk: Desk, line: Line, layer: int) -> list[Bytes]:
    """The bytes of a line's prompt in one layer."""
    size = desk.layout.block_tokens
    positions = np.arange(len(line.sequence.prompt))
    blocks = np.array(line.blocks)[positions // size]
    return [array[blocks, layer, positions % size] for array in desk.snapshot()]


def copied_blocks_are_equal(bench: SteppedBench) -> None:
    """`copy_blocks` copies all layers, also for the device; a copy outlives its original."""
    desk = bench.desk
    prompt = bench.prompts(2)[0]
    expected = desk.run(prompt, STEPS, sampling=bench.judged)
    line, copy = bench.line(prompt), bench.line(prompt)
    desk.prefill(line)
    desk.cover(copy, len(prompt))
    pairs = list(zip(line.blocks, copy.blocks, strict=True))
    desk.copy_blocks(pairs)
    for array in desk.snapshot():
        same = all(np.array_equal(array[source], array[target]) for source, target in pairs)
        require(same, "copy_blocks: the copy is not equal to the original in the pool")
    desk.release(line)
    desk.run(prompt[::-1], 1, sampling=bench.judged)  # in the blocks of the original
    copy.generated.append(expected[0].token)
    desk.force(copy, [it.token for it in expected[:-1]])
    require_alike(
        copy.sampled,
        expected[1:],
        own_bounds(desk.info),
        "copy_blocks: a sequence goes on otherwise from copied blocks; copy every layer, K and V, "
        "in the device's memory too",
    )
    desk.copy_blocks([])
    desk.release(copy)
