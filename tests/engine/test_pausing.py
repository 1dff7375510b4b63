"""Sequences that nobody reads for a while."""

from backends.api import Sampled
from backends.host.untold import PAUSED_TOKENS
from tests.engine.played import given, played


async def test_a_paused_sequence_is_told_nothing_and_loses_nothing() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        running.paused = True
        for token in range(5):
            desk.say.decoded([(name, Sampled(token))])
        desk.say.ended(name)
        await desk.heard()
        assert desk.told.tokens == []
        running.paused = False
        desk.loop.resume()
        await desk.until(lambda: desk.told.losses)
        assert desk.told.tokens == [0, 1, 2, 3, 4]


async def test_a_sequence_that_stays_paused_is_computed_no_more() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        running.paused = True
        for token in range(PAUSED_TOKENS + 1):
            desk.say.decoded([(name, Sampled(token))])
        await desk.until(lambda: desk.engine.aborted == [name])
        desk.say.decoded([(name, Sampled(0))])
        desk.say.ended(name)
        await desk.heard()
        assert (desk.told.tokens, desk.told.losses, desk.loop.running) == ([], [], 1)
        running.paused = False
        desk.loop.resume()
        await desk.until(lambda: desk.told.losses)
        assert desk.told.tokens == list(range(PAUSED_TOKENS + 1))
        assert desk.told.losses[0][0] == "preempted"
        assert desk.told.freed == [running]


async def test_what_a_paused_sequence_said_before_it_failed_is_told() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        running.paused = True
        desk.say.decoded([(name, Sampled(1)), (name, Sampled(2))])
        desk.say.failed(name, RuntimeError("fell over"))
        await desk.heard()
        assert not desk.told.losses
        running.paused = False
        desk.loop.resume()
        await desk.until(lambda: desk.told.tokens == [1, 2])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.losses)
        assert "fell over" in desk.told.losses[0][1]
        assert desk.told.freed == [running]
