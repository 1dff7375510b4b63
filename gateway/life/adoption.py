"""Find what workers keep of a job whose former owner is gone, and go on with it there.

Every worker is asked: each is the judge of what it has, and Redis may have forgotten where that
was. What they say is kept until it is decided which attempt at each sequence is the latest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from backends.protocol import (
    KEEPS,
    Adopt,
    Adopted,
    Cancel,
    Disown,
    Failed,
    HandedOver,
    Landed,
    Part,
    Stage,
    Token,
)
from gateway.life.fleet import Fleet
from gateway.life.leg import Leg
from gateway.life.line import Line, Run
from gateway.life.placing import Placed, Unbooked
from gateway.life.states import Life, State
from gateway.life.worker import LegMessage, Worker
from gateway.resume import JobClaim

log = structlog.get_logger()

LOOK_AGAIN_SECONDS = 0.1
LANDING_SECONDS = 0.25
STATES = {
    "prefilling": State.PREFILLING,
    "landing": State.HANDING_OVER,
    "decoding": State.DECODING,
}

Said = tuple[Worker, Token | LegMessage]


class Ear:
    """Hears what one worker keeps of a claim, until a leg takes over (`worker.LegPort`)."""

    def __init__(self, worker: Worker, news: asyncio.Event) -> None:
        self.worker = worker
        self.answer: Adopted | None = None
        self.gone = False
        self.said: list[tuple[int, Token | LegMessage]] = []
        self._news = news

    def token(self, row: Token) -> None:
        """One more token of what is kept."""
        self.said.append((row.handle, row))

    def heard(self, _: Worker, message: LegMessage) -> None:
        """The answer, or something about what is kept."""
        if isinstance(message, Adopted):
            self.answer = message
        else:
            self.said.append((message.handle, message))
        self._news.set()

    def lost(self, _: Worker, reason: str) -> None:
        """The worker is gone, and what it kept with it."""
        self.gone = True
        self._news.set()

    @property
    def parts(self) -> Sequence[Part]:
        """What the worker has."""
        return self.answer.parts if self.answer is not None and not self.gone else ()

    def landed(self, handle: int) -> bool:
        """Whether that part waits for a handoff no more."""
        return any(
            handle == about and isinstance(item, Landed | Failed) for about, item in self.said
        )


@dataclass(slots=True, eq=False)
class Found:
    """An attempt that goes on: the lines that are still its, and where it is."""

    handle: int
    indexes: set[int] = field(default_factory=set)
    prefill: Worker | None = None
    decode: Worker | None = None
    stage: Stage = "prefilling"
    ears: list[Ear] = field(default_factory=list)

    @property
    def said(self) -> Iterator[Said]:
        """What the workers have said of it up to now."""
        for ear in self.ears:
            for handle, item in ear.said:
                if handle == self.handle:
                    yield ear.worker, item

    def join(self, ear: Ear, part: Part) -> None:
        """One worker's part of it."""
        self.ears.append(ear)
        if part.stage == "prefilling":
            self.prefill = ear.worker
        else:
            self.decode, self.stage = ear.worker, part.stage


class Adoption:
    """One job's. It is closed by whoever made it; what no leg has entered is disowned then."""

    def __init__(self, fleet: Fleet, claim: JobClaim, n: int) -> None:
        self._fleet = fleet
        self._claim = claim
        self._n = n
        self._news = asyncio.Event()
        self._ears: dict[Worker, Ear] = {}
        self._base = 0

    async def find(self, patience: float) -> list[Found]:
        """What is kept, once all workers have answered or `patience` seconds are over.

        Raises:
            TakenOver: another gateway has adopted it since.
            QueueUnavailable: Redis had forgotten our right, and does not answer now.
        """
        until = asyncio.get_running_loop().time() + patience
        seen = await self._ask(until)
        while seen:
            self.close()
            await self._claim.outbid(seen)
            seen = await self._ask(until)
        return self._decide()

    def close(self) -> None:
        """Listen no more; nobody owns what no leg has taken."""
        for worker, ear in self._ears.items():
            for handle in range(self._base, self._base + self._n):
                if worker.legs.get(handle) is ear:
                    del worker.legs[handle]
                    worker.send(Disown(handle=handle))
        self._ears.clear()

    async def _ask(self, until: float) -> int:
        """Ask all workers; the highest epoch that one of them has seen, if ours is too low."""
        loop = asyncio.get_running_loop()
        handles = [self._fleet.next_handle() for _ in range(self._n)]
        self._base = handles[0]
        landing = 0.0
        while loop.time() < until:
            self._ask_newcomers()
            answers = [ear.answer for ear in self._ears.values() if ear.answer is not None]
            if any(answer.epoch for answer in answers):
                return max(answer.epoch for answer in answers)
            if self._all_answered():
                landing = landing or loop.time() + LANDING_SECONDS
                if not self._lands_alone() or loop.time() >= landing:
                    return 0
            self._news.clear()
            try:
                async with asyncio.timeout(LOOK_AGAIN_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                pass
        return 0

    def _ask_newcomers(self) -> None:
        for worker in self._fleet.workers:
            if worker not in self._ears and worker.welcome.version >= KEEPS:
                ear = self._ears[worker] = Ear(worker, self._news)
                for handle in range(self._base, self._base + self._n):
                    worker.legs[handle] = ear
                worker.send(
                    Adopt(handle=self._base, claim=self._claim.name, epoch=self._claim.epoch)
                )

    def _all_answered(self) -> bool:
        connected = {worker.id for worker in self._fleet.workers}
        heard = all(ear.answer is not None or ear.gone for ear in self._ears.values())
        return heard and connected >= self._fleet.named

    def _lands_alone(self) -> bool:
        """Whether somebody waits for a handoff that nobody works on: it may be just over."""
        parts = [(ear, part) for ear in self._ears.values() for part in ear.parts]
        at_work = {(part.handle, part.epoch) for _, part in parts if part.stage == "prefilling"}
        return any(
            part.stage == "landing"
            and (part.handle, part.epoch) not in at_work
            and not ear.landed(part.handle)
            for ear, part in parts
        )

    def _decide(self) -> list[Found]:
        """The latest attempt at each sequence goes on; all others are ended."""
        parts = [(ear, part) for ear in self._ears.values() for part in ear.parts]
        latest: dict[int, tuple[int, int]] = {}
        for _, part in parts:
            for index in part.indexes:
                key = (part.epoch, part.handle)
                latest[index] = max(latest.get(index, key), key)
        found: dict[tuple[int, int], Found] = {}
        for index, key in latest.items():
            found.setdefault(key, Found(key[1])).indexes.add(index)
        for ear, part in parts:
            one = found.get((part.epoch, part.handle))
            if one is None:
                ear.worker.legs.pop(part.handle, None)
                ear.worker.send(Cancel(handle=part.handle))
            else:
                one.join(ear, part)
        log.info(
            "request.adopted",
            claim=self._claim.name,
            parts=len(parts),
            sequences=len(latest),
            workers=sorted({ear.worker.id for ear, _ in parts}),
        )
        return list(found.values())


class AdoptedLeg(Leg):
    """A leg that another gateway, or an earlier connection, has begun."""

    def __init__(
        self,
        fleet: Fleet,
        run: Run,
        life: Life,
        lines: list[Line],
        found: Found,
        orphaned: Callable[[list[Line]], None],
    ) -> None:
        prefill, decode = found.prefill or found.decode, found.decode
        assert prefill is not None
        placed = Placed(prefill, None if decode is prefill else decode, Unbooked())
        super().__init__(fleet, run, life, lines, placed, orphaned)
        self._handle = found.handle
        self._found = found

    def heard(self, worker: Worker, message: LegMessage) -> None:
        """As `Leg.heard`; what went to a worker that did not say that it has it is lost."""
        super().heard(worker, message)
        if isinstance(message, HandedOver) and self._decode is None:
            self._fail("handoff", worker, "lost", "nobody keeps what it handed over", retry=True)

    async def _begin(self) -> None:
        """Take what has been said so far, also since it was decided to go on here."""
        found = self._found
        self._become(STATES[found.stage])
        if found.stage == "decoding":
            self._arrived()
        for worker, item in found.said:
            if isinstance(item, Token):
                self.token(item)
            else:
                self.heard(worker, item)
        for ear in found.ears:
            if ear.gone:
                self.lost(ear.worker, "it ended while it was asked")
        if found.stage == "landing" and found.prefill is None and self._landed is None:
            self._fail("handoff", self._prefill, "lost", "nobody hands it over", retry=True)
