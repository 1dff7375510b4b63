"""Prefixes that an engine computes and exports."""

import asyncio
from typing import Any

import pytest

from backends.api import Output, PrefillJob, Sampled
from backends.host.ledger import Holder
from tests.engine.played import INFO, LAYERS, PROMPT, given, played


async def test_a_prefix_is_handed_over_as_it_is_exported() -> None:
    async with played() as desk:
        work = desk.prefix()
        (name,) = await given(desk)
        job = desk.engine.jobs[name]
        assert isinstance(job, PrefillJob)
        assert (job.tokens, list(job.blocks)) == (PROMPT, work.blocks)
        desk.say.ready(name, 0, 16)
        for layer in range(LAYERS):
            desk.say.ready(name, 16, 40, layer)
        desk.say.prefilled(name, Output((Sampled(5),)), 16)
        await desk.until(lambda: desk.told.outputs)
        assert sorted(desk.told.ready) == sorted(
            [(at, 0, 16) for at in range(LAYERS)] + [(at, 16, 40) for at in range(LAYERS)]
        )
        assert (work.done, work.reused, desk.loop.waiting) == (40, 16, 0)
        desk.told.end(work)  # as when the handoff is over
        assert not desk.told.freed
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [work])


@pytest.mark.parametrize(
    "exports",
    [
        [],
        [(0, 39, None)],
        [(0, 40, layer) for layer in range(LAYERS - 1)],
        [(0, 16, None), (17, 40, None)],
        [(16, 40, None)],
        [(0, 41, None)],
        [(0, 40, LAYERS)],
        [(0, 40, None), (0, 40, 0)],
        [(0, 0, None)],
    ],
)
async def test_a_prefix_that_is_exported_otherwise_than_whole_is_lost(exports: list[Any]) -> None:
    async with played() as desk:
        work = desk.prefix()
        (name,) = await given(desk)
        for start, end, layer in exports:
            desk.say.ready(name, start, end, layer)
        desk.say.prefilled(name, Output((Sampled(5),)))
        await desk.until(lambda: desk.told.losses)
        assert desk.told.losses[0][0] == "engine_failed"
        assert "export" in desk.told.losses[0][1]
        assert not desk.told.outputs
        await desk.until(lambda: desk.engine.aborted == [name])
        assert not desk.told.freed
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [work])


@pytest.mark.parametrize(
    ("output", "scores"),
    [(Output(), None), (Output((Sampled(1), Sampled(2))), None), (Output((Sampled(1),)), 0)],
)
async def test_a_result_of_the_wrong_size_is_lost(output: Output, scores: int | None) -> None:
    async with played() as desk:
        desk.prefix(scores=scores)
        (name,) = await given(desk)
        desk.say.ready(name, 0, 40)
        desk.say.prefilled(name, output)
        await desk.until(lambda: desk.told.losses)
        assert not desk.told.outputs


async def test_a_prefix_is_done_once() -> None:
    async with played() as desk:
        desk.prefix()
        (name,) = await given(desk)
        desk.say.ready(name, 0, 40)
        for _ in range(2):
            desk.say.prefilled(name, Output((Sampled(5),)))
        await desk.heard()
        assert len(desk.told.outputs) == 1


async def test_a_prefix_waits_for_room_in_the_arena() -> None:
    async with played() as desk:
        holder = Holder("landing", "x")
        desk.ledger.take(INFO.pool_blocks - 2, holder)
        desk.prefix()
        second = desk.prefix()
        desk.told.end(second)
        assert desk.told.freed == [second]
        await asyncio.sleep(0)
        assert (desk.loop.waiting, desk.loop.waiting_tokens) == (1, 40)
        assert not desk.engine.jobs
        desk.ledger.release(holder)
        desk.loop.resume()
        assert len(await given(desk)) == 1
