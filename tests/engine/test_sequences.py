"""Sequences that an engine imports and decodes."""

from typing import Any

import pytest

from backends.api import Sampled
from tests.engine.played import INFO, given, played


async def test_a_sequence_lets_the_arena_go_when_it_is_imported() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        assert desk.ledger.free == INFO.pool_blocks - 3
        desk.say.imported(name)
        await desk.until(lambda: desk.ledger.free == INFO.pool_blocks)
        desk.say.decoded([(name, Sampled(3)), (name, Sampled(4))])
        await desk.until(lambda: desk.told.tokens == [3, 4])
        desk.told.end(running)
        await desk.until(lambda: desk.engine.aborted == [name])
        desk.say.decoded([(name, Sampled(5))])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [running])
        assert desk.told.tokens == [3, 4]


async def test_a_cancelled_import_keeps_the_arena_until_it_has_ended() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        desk.told.end(running)
        await desk.until(lambda: desk.engine.aborted == [name])
        assert not desk.told.freed
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [running])


@pytest.mark.parametrize("token", [Sampled(-1), Sampled(INFO.vocabulary), None])
async def test_what_is_no_token_loses_its_sequence(token: Any) -> None:
    async with played() as desk:
        desk.landed()
        (name,) = await given(desk)
        desk.say.decoded([(name, token)])
        await desk.until(lambda: desk.told.losses)
        await desk.until(lambda: desk.engine.aborted == [name])


async def test_a_sequence_that_the_engine_ends_too_early_is_lost_after_its_tokens() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        desk.say.decoded([(name, Sampled(3))])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.losses)
        assert (desk.told.tokens, desk.told.freed) == ([3], [running])
        assert "before its last token" in desk.told.losses[0][1]
