"""One leg, fed by hand with the messages of two workers in every order that they may come in."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.protocol import (
    VERSION,
    Failed,
    First,
    FirstToken,
    Granted,
    HandedOver,
    Landed,
    Landing,
    Link,
    Message,
    Sampling,
    ToGateway,
    Token,
    Welcome,
)
from gateway.admission import WorkerRecord
from gateway.life.failure import LegFailed
from gateway.life.fleet import Fleet
from gateway.life.job import Job
from gateway.life.leg import Leg
from gateway.life.line import Line, Run
from gateway.life.placing import Placed
from gateway.life.states import Life, State
from gateway.life.worker import Worker
from gateway.placement import Booking, Books, Placement, Wish
from gateway.placement.views import Forecast, Reason
from tests.life.cluster import SHAPE, Heard
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS
from transfer.layout import Epoch

INFO = SyntheticBackend(**SHAPE).info
HANDLE = 1


def worker(name: str, role: str) -> Worker:
    """A worker whose connection takes everything and says nothing."""
    record = WorkerRecord(
        id=name,
        incarnation=1,
        role=role,
        model="m",
        address="unix:/nowhere",
        prefill_tokens=1,
        decode_tokens=1,
    )
    welcome = Welcome(version=VERSION, worker=name, incarnation=1, role=role, info=INFO)
    link = Link(ToGateway, lambda *_: None, lambda *_: None)
    return Worker(record, link, welcome, lambda *_: None)


def token(index: int, position: int) -> int:
    """The one true token of that sequence at that position."""
    return 1000 * (index + 1) + position


def booked(job: Job) -> Booking:
    forecast = Forecast(first_token=0, wait=0, beside=0, handoff=0, gap=0, delay=0)
    wish = Wish(tokens=len(job.prompt), sequences=job.n, sampling=job.sampling)
    return Books().place(Placement("p", "d", forecast, Reason("")), wish, 16, 0.0)


class Track:
    """A leg on two workers; `say` plays a worker."""

    def __init__(self, n: int, length: int, *, stop_after: int | None = None, bound: int = 0):
        loop = asyncio.get_running_loop()
        job = Job(
            id="job",
            model="m",
            tenant="t",
            prompt=[1, 2, 3],
            seeds=tuple(range(n)),
            sampling=Sampling(),
            max_tokens=length,
            deadline=loop.time() + LONG_SECONDS,
            decode_estimate=length,
        )
        self.heard = Heard(stop_after)
        self.run = Run.of(job, self.heard)
        for line in self.run.lines:
            line.generated += [token(line.index, position) for position in range(bound)]
            self.heard.tokens[line.index] = list(line.generated)
        self.life = Life(State.PLACED)
        self.prefill, self.decode = worker("p", "prefill"), worker("d", "decode")
        self.orphans: list[Line] = []
        self.leg = Leg(
            Fleet("g", ""),
            self.run,
            self.life,
            list(self.run.lines),
            Placed(self.prefill, self.decode, booked(job)),
            self.orphans.extend,
        )

    async def go(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.leg.go()

    def say(self, who: Worker, message: Message | Token) -> None:
        leg = who.legs.get(HANDLE)
        if leg is None:
            return
        if isinstance(message, Token):
            leg.token(message)
        else:
            leg.heard(who, message)

    def granted(self) -> Granted:
        landing = Landing(
            id="l",
            epoch=Epoch(1, 1),
            secret=b"s" * 16,
            worker="d",
            endpoints=(),
            layout=INFO.layout,
            pool_blocks=INFO.pool_blocks,
            blocks=(0,),
            tokens=3,
            lease_seconds=1.0,
        )
        return Granted(handle=HANDLE, landing=landing)

    def firsts(self, finish: str | None = None, *, bound: bool = False) -> FirstToken:
        lines = () if bound else self.run.lines
        first = tuple(First(line.index, token(line.index, 0), finish) for line in lines)
        return FirstToken(handle=HANDLE, first=first, wait=0.0, prefill=0.0)

    def row(self, index: int, position: int) -> Token:
        finish = "length" if position == self.run.job.max_tokens - 1 else None
        return Token(HANDLE, index, position, token(index, position), finish)


async def test_a_prefill_worker_lost_after_the_landing_with_the_first_token_fails_the_leg() -> None:
    track = Track(1, 3)
    going = asyncio.ensure_future(track.go())
    await asyncio.sleep(0)
    track.say(track.decode, track.granted())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    track.say(track.decode, Landed(handle=HANDLE, verify=0.0))
    track.say(track.decode, track.row(0, 1))
    track.leg.lost(track.prefill, "gone, and its first token with it")
    with pytest.raises(LegFailed, match="first token"):
        await going


async def test_a_prefill_worker_that_gave_all_it_had_is_not_missed() -> None:
    track = Track(1, 2)
    going = asyncio.ensure_future(track.go())
    await asyncio.sleep(0)
    track.say(track.decode, track.granted())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    track.say(track.prefill, track.firsts())
    track.say(track.decode, Landed(handle=HANDLE, verify=0.0))
    failed = Failed(handle=HANDLE, phase="handoff", code="PeerLost", detail="", retry=True)
    track.say(track.prefill, failed)
    track.leg.lost(track.prefill, "gone")
    track.say(track.decode, track.row(0, 1))
    await going
    assert track.heard.tokens == {0: [token(0, 0), token(0, 1)]}


async def test_tokens_of_an_earlier_leg_that_waited_for_others_are_forgotten() -> None:
    track = Track(1, 9)
    line = track.run.lines[0]
    line.early[1] = Token(77, 0, 1, 666)
    going = asyncio.ensure_future(track.go())
    await asyncio.sleep(0)
    track.say(track.decode, track.granted())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    track.say(track.prefill, track.firsts())
    assert line.generated == [token(0, 0)]
    going.cancel()
    await asyncio.wait([going])


async def test_a_sequence_that_was_given_up_belongs_to_the_leg_no_more() -> None:
    track = Track(2, 9)
    going = asyncio.ensure_future(track.go())
    await asyncio.sleep(0)
    preempted = Failed(
        handle=HANDLE, phase="decode", code="preempted", detail="", retry=True, indexes=(0,)
    )
    track.say(track.decode, preempted)
    assert track.orphans == [track.run.lines[0]]
    assert track.run.lines[0].leg is not track.leg
    assert track.run.lines[1].leg is track.leg
    going.cancel()
    await asyncio.wait([going])


def scripts(track: Track, dice: random.Random, n: int, length: int, bound: int) -> Any:
    """What each worker says, in its own order; one of them may fail at any point."""
    first: list[Any] = [
        track.firsts(bound=bool(bound)),
        HandedOver(handle=HANDLE, bytes=1, exposed=0.0, overlapped=0.0, verify=0.0),
    ]
    rows = [track.row(i, at) for at in range(max(bound, 1), length) for i in range(n)]
    decode: list[Any] = [Landed(handle=HANDLE, verify=0.0), *rows]
    broken = dice.choice(["", "", "prefill", "decode", "lost"])
    phase = "handoff" if broken == "prefill" else "decode"
    failed = Failed(handle=HANDLE, phase=phase, code="x", detail="", retry=True)
    if broken == "prefill":
        first[dice.randrange(2) :] = [failed]
    if broken == "decode":
        decode[dice.randrange(len(decode)) :] = [failed]
    if broken == "lost":
        decode[dice.randrange(len(decode)) :] = ["lost"]
    return first, decode, broken


def interleaved(dice: random.Random, *queues: list[Any]) -> Iterator[tuple[int, Any]]:
    waiting = [list(queue) for queue in queues]
    while any(waiting):
        number = dice.choice([i for i, queue in enumerate(waiting) if queue])
        yield number, waiting[number].pop(0)


@pytest.mark.parametrize("seed", range(300))
async def test_a_leg_ends_well_or_fails_in_every_order_of_messages(seed: int) -> None:
    dice = random.Random(seed)
    n, length = dice.randint(1, 3), dice.randint(2, 5)
    stop = dice.choice([None, None, 1, 2])
    bound = 1 if stop is None and dice.random() < 0.3 else 0
    track = Track(n, length, stop_after=stop, bound=bound)
    going = asyncio.ensure_future(track.go())
    await asyncio.sleep(0)
    track.say(track.decode, track.granted())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first, decode, broken = scripts(track, dice, n, length, bound)
    for number, message in interleaved(dice, first, decode):
        who = (track.prefill, track.decode)[number]
        if message == "lost":
            track.leg.lost(who, "gone")
        else:
            track.say(who, message)
        if dice.random() < 0.5:
            await asyncio.sleep(0)
    try:
        await going
        assert all(line.ended for line in track.run.lines)
        assert track.life.state is State.DONE
    except LegFailed:
        assert broken
        track.life.become(State.PLACED)
    assert not track.prefill.legs
    assert not track.decode.legs
    for index, line in track.heard.tokens.items():
        assert line == [token(index, position) for position in range(len(line))]
