"""A leg on what another gateway has begun: what it takes from what was said before."""

import asyncio
from collections.abc import Iterable

import pytest

from backends.protocol import Part, Token
from gateway.life.adoption import AdoptedLeg, Ear, Found
from gateway.life.failure import LegFailed
from gateway.life.fleet import Fleet
from tests.life.test_leg import HANDLE, Track, token
from tests.support.patience import PATIENCE_SECONDS


class Adopted:
    """A leg on what one worker keeps, which has said the first `count` tokens so far."""

    def __init__(self, count: int) -> None:
        track = Track(1, 5)
        self.run, self.heard = track.run, track.heard
        self.worker = track.decode
        self.ear = Ear(self.worker, asyncio.Event())
        self.worker.legs[HANDLE] = self.ear
        self.say(range(count))
        found = Found(HANDLE, {0})
        found.join(self.ear, Part(HANDLE, 1, "decoding", (0,)))
        self.leg = AdoptedLeg(
            Fleet("g", ""), track.run, track.life, list(track.run.lines), found, lambda _: None
        )

    def say(self, positions: Iterable[int]) -> None:
        for position in positions:
            finish = "length" if position == 4 else None
            row = Token(HANDLE, 0, position, token(0, position), finish)
            self.worker.legs[HANDLE].token(row)

    async def go(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.leg.go()


async def test_what_is_said_before_the_leg_listens_is_not_missed() -> None:
    adopted = Adopted(2)
    adopted.say([2])  # it is decided to go on here, and the leg has not entered yet
    going = asyncio.ensure_future(adopted.go())
    await asyncio.sleep(0)
    adopted.say([3, 4])
    await going
    assert adopted.heard.tokens == {0: [token(0, position) for position in range(5)]}


async def test_a_worker_that_is_lost_before_the_leg_listens_fails_it() -> None:
    adopted = Adopted(2)
    adopted.ear.lost(adopted.worker, "gone")
    with pytest.raises(LegFailed, match="lost"):
        await adopted.go()
