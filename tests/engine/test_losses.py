"""Jobs that an engine refuses or fails, events without sense, and engines that hang or die."""

import asyncio

import pytest

from backends.api import BackendError, Output, PoolExhausted, Sampled
from backends.host.loop import DeviceHangs, EngineDied
from tests.engine.played import INFO, Desk, given, played
from tests.support.patience import PATIENCE_SECONDS


@pytest.mark.parametrize(
    ("error", "code"), [(BackendError("no"), "engine_failed"), (PoolExhausted("x"), "preempted")]
)
@pytest.mark.parametrize("kind", ["prefill", "decode", "in place"])
async def test_a_job_that_is_refused_is_lost_alone(error: Exception, code: str, kind: str) -> None:
    async with played() as desk:
        desk.engine.refusal = error
        item = desk.landed() if kind == "decode" else desk.prefix(here=kind == "in place", n=3)
        await desk.until(lambda: desk.told.losses)
        assert [it for it, _ in desk.told.losses] == [code]
        assert desk.told.freed == [item]
        desk.engine.refusal = None
        desk.prefix()
        await given(desk)


@pytest.mark.parametrize("kind", ["prefill", "decode", "in place"])
async def test_what_fails_is_free_when_it_has_ended(kind: str) -> None:
    async with played() as desk:
        item = desk.landed() if kind == "decode" else desk.prefix(here=kind == "in place")
        (name,) = await given(desk)
        desk.say.failed(name, RuntimeError("fell over"))
        desk.say.failed(name, RuntimeError("again"))
        await desk.until(lambda: desk.told.losses)
        assert desk.told.losses == [("engine_failed", "RuntimeError: fell over")]
        assert desk.told.freed == ([item] if kind == "in place" else [])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [item])
        assert not desk.engine.aborted


async def test_events_that_make_no_sense_change_nothing() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        for job in ("nobody", name):
            desk.say.ready(job, 0, 40)
            desk.say.prefilled(job, Output((Sampled(1),)))
        for _ in range(2):
            desk.say.imported(name)
            desk.say.imported("nobody")
        desk.say.failed("nobody", RuntimeError("x"))
        desk.say.decoded([("nobody", Sampled(1)), (name, Sampled(3))])
        await desk.until(lambda: desk.told.tokens == [3])
        desk.told.end(running)
        for _ in range(2):
            desk.say.ended(name)
            desk.say.ended("nobody")
        await desk.until(lambda: desk.told.freed == [running])
        await desk.heard()
        assert (desk.told.losses, desk.told.outputs, desk.task.done()) == ([], [], False)


async def test_memory_of_what_has_ended_is_out_of_balance() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        desk.engine.held = {name: 4}
        assert desk.loop.pins.held == ((name, 4),)
        assert not desk.loop.pins.wrong
        assert desk.loop.room.free == INFO.engine_blocks - 4
        desk.told.end(running)
        desk.say.ended(name)
        await desk.until(lambda: desk.loop.pins.wrong)


async def hung(desk: Desk, error: type[Exception]) -> str:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.wait([desk.task])
    with pytest.raises(error) as raised:
        await desk.task
    return str(raised.value)


async def test_an_engine_that_does_not_end_what_was_aborted_hangs() -> None:
    async with played(answer_seconds=1.0) as desk:
        running, _ = desk.landed(), desk.landed(1)
        name, other = await given(desk, 2)
        desk.told.end(running)

        def go_on() -> None:
            desk.say.decoded([(other, Sampled(1))])
            asyncio.get_running_loop().call_later(0.02, go_on)

        go_on()
        assert name in await hung(desk, DeviceHangs)
        assert not desk.told.freed


async def test_an_engine_that_does_not_end_what_failed_hangs() -> None:
    async with played(answer_seconds=0.1) as desk:
        desk.landed()
        (name,) = await given(desk)
        desk.say.failed(name, RuntimeError("x"))
        assert name in await hung(desk, DeviceHangs)


async def test_an_engine_with_jobs_that_says_nothing_hangs() -> None:
    async with played(answer_seconds=0.1) as desk:
        await asyncio.sleep(0.15)
        assert not desk.task.done(), "it had nothing to say"
        desk.prefix()
        assert "1 jobs" in await hung(desk, DeviceHangs)


async def test_an_engine_that_says_that_it_died_has_died() -> None:
    async with played() as desk:
        desk.say.died("out of memory")
        assert await hung(desk, EngineDied) == "out of memory"


async def test_an_engine_whose_abort_raises_has_died() -> None:
    async with played() as desk:
        running = desk.landed()
        await given(desk)
        desk.engine.refusal = RuntimeError("no connection")
        desk.told.end(running)
        assert "no connection" in await hung(desk, EngineDied)
