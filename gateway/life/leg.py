"""One attempt to bring some sequences of a job to their end, on workers chosen for it.

A leg reserves, prefills, hands over and decodes. It ends when all of its sequences have, or
fails as a whole; what its sequences have got so far is kept by their lines, and the next leg
goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from backends.protocol import (
    CACHES,
    FENCED,
    KEEPS,
    Cancel,
    Disown,
    Failed,
    FirstToken,
    Flow,
    Granted,
    HandedOver,
    Landed,
    Landing,
    Prefill,
    Refused,
    RequestSpec,
    Reserve,
    SequenceSpec,
    Token,
)
from gateway.errors import TakenOver
from gateway.life.breakers import Breaker, culprit
from gateway.life.failure import LegFailed
from gateway.life.fleet import Fleet
from gateway.life.line import Line, Run
from gateway.life.placing import Placed
from gateway.life.states import Life, State
from gateway.life.worker import LegMessage, Worker

log = structlog.get_logger()


class Leg:
    """See the module. `orphaned` takes lines that a worker gave up while it keeps the others.

    The leg ends the booking of `placed` when it is left.
    """

    def __init__(
        self,
        fleet: Fleet,
        run: Run,
        life: Life,
        lines: list[Line],
        placed: Placed,
        orphaned: Callable[[list[Line]], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._run = run
        self._life = life
        self._lines = {line.index: line for line in lines}
        self._prefill = placed.prefill
        self._decode = placed.decode
        self._booking = placed.booking
        self._orphaned = orphaned
        self._fleet = fleet
        self._handle = fleet.next_handle()
        self._indexes = tuple(self._lines)
        self._attempt = run.next_attempt()
        self._granted: asyncio.Future[Landing] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        self._landed: float | None = None
        self._stopped = False
        self._timed = False
        self._told: set[int] = set()
        self._trials: list[Breaker] = []
        self._began = loop.time()

    async def go(self) -> None:
        """Bring every line to its end.

        Raises:
            LegFailed: see there; everything on the workers has been cancelled.
            TakenOver: another gateway goes on with it.
        """
        self._enter()
        try:
            await self._begin()
            await self._over
        finally:
            self._leave()

    async def _begin(self) -> None:
        landing = await self._reserve()
        self._life.become(State.PREFILLING)
        decode_here = self._decode is None and self._prefill.welcome.role == "both"
        self._prefill.send(Prefill(spec=self._spec(), landing=landing, decode_here=decode_here))

    def pause(self, index: int, paused: bool) -> None:
        """Stop or resume decoding one of its sequences."""
        decode = self._decode or self._prefill
        decode.send(Flow(handle=self._handle, index=index, paused=paused))

    def _pause_again(self) -> None:
        """The sequences begin to run here: those that were paused before must not."""
        for line in self._lines.values():
            if line.paused:
                self.pause(line.index, True)

    # ---- entering and leaving

    @property
    def _workers(self) -> tuple[Worker, ...]:
        return (self._prefill,) if self._decode is None else (self._prefill, self._decode)

    @property
    def _others(self) -> tuple[str | tuple[str, str], ...]:
        """The breakers that concern the handoff: the decode worker's, and the pair's."""
        decode = self._decode
        return () if decode is None else (decode.id, (self._prefill.id, decode.id))

    def _enter(self) -> None:
        for worker in self._workers:
            worker.legs[self._handle] = self
        for line in self._lines.values():
            line.leg = self
            line.early.clear()
        self._trials = self._fleet.breakers.enter(self._prefill.id, *self._others)

    def _leave(self) -> None:
        over = self._over
        done = over.done() and not over.cancelled()
        failure = over.exception() if done else None
        # A landing whose sequences all ended with their first token is waited for by nobody.
        landed = self._decode is None or self._landed is not None
        clean = done and failure is None and landed and not self._stopped
        for worker in self._workers:
            worker.legs.pop(self._handle, None)
            if self._run.kept and worker.welcome.version >= KEEPS:
                self._part_with(worker, done, failure, clean)
            elif not clean:
                worker.send(Cancel(handle=self._handle))
        self._booking.end(asyncio.get_running_loop().time())
        self._fleet.breakers.leave(self._trials)
        for future in (self._granted, self._over):
            future.cancel()

    def _part_with(
        self, worker: Worker, done: bool, failure: BaseException | None, clean: bool
    ) -> None:
        """Leave a worker that keeps the job for whoever asks for it again."""
        run, handle = self._run, self._handle
        if done and failure is None:
            if not clean:
                worker.send(Cancel(handle=handle, indexes=self._indexes))
            run.keepers.append((worker, handle))
        elif isinstance(failure, LegFailed) or run.job.late:
            worker.send(Cancel(handle=handle))
        else:
            worker.send(Disown(handle=handle))

    def _spec(self) -> RequestSpec:
        job = self._run.job
        wants = None if self._run.has_prompt_logprobs else job.prompt_logprobs
        claim = job.claim if self._run.kept else None
        return RequestSpec(
            handle=self._handle,
            request=job.id,
            prompt=job.prompt,
            sequences=tuple(
                SequenceSpec(
                    index=line.index,
                    seed=line.seed,
                    generated=line.generated,
                    logprobs=tuple(line.logprobs),
                )
                for line in self._lines.values()
            ),
            sampling=job.sampling,
            max_tokens=job.max_tokens,
            deadline_seconds=max(0.0, job.deadline - asyncio.get_running_loop().time()),
            prompt_logprobs=wants,
            salt=job.salt,
            claim=claim.name if claim is not None else "",
            epoch=claim.epoch + self._attempt if claim is not None else 0,
            keep_seconds=claim.keep_seconds if claim is not None else 0.0,
        )

    async def _reserve(self) -> Landing | None:
        if self._decode is None:
            return None
        began = time.monotonic()
        transport = self._fleet.transport(self._prefill, self._decode)
        self._decode.send(
            Reserve(
                spec=self._spec(),
                prefill=self._prefill.id,
                transport=transport,
                partial=self._prefill.welcome.version >= CACHES,
                sources=self._prefill.welcome.info.shards,
            )
        )
        done, _ = await asyncio.wait(
            (self._granted, self._over), return_when=asyncio.FIRST_COMPLETED
        )
        if self._over in done:
            self._over.result()
        self._run.timeline.reserve = time.monotonic() - began
        landing = self._granted.result()
        self._run.timeline.present_tokens = landing.present
        return landing

    # ---- what workers say (`worker.LegPort`)

    def token(self, row: Token) -> None:
        """Take a token in its place; one that overtook others waits for them."""
        line = self._lines.get(row.index)
        if line is None:
            return
        if line.ended:
            self._stop(line.index)
            return
        place = len(line.generated)
        if row.position == place:
            self._accept(line, row)
            if line.early:
                self._catch_up(line)
        elif row.position > place:
            line.early[row.position] = row

    def heard(self, worker: Worker, message: LegMessage) -> None:
        """Anything but tokens."""
        match message:
            case Granted():
                if not self._granted.done():
                    self._granted.set_result(message.landing)
            case FirstToken():
                self._on_first(message)
            case HandedOver():
                timeline = self._run.timeline
                timeline.exposed_transfer = message.exposed
                timeline.overlapped_transfer = message.overlapped
                timeline.verify = message.verify
                self._booking.handed_over(message.bytes, message.exposed + message.verify)
            case Landed():
                self._fleet.breakers.succeeded(*self._others)
                self._become(State.DECODING)
                self._arrived()
            case Refused():
                phase = "reserve" if worker is self._decode else "prefill"
                retry = message.kind != "invalid"
                self._fail(phase, worker, message.kind, message.detail, retry=retry)
            case Failed():
                self._on_failed(worker, message)

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker that is still needed is gone."""
        if self._gave_all(worker):
            return
        phase = "decode" if worker is self._decode else "prefill"
        self._fail(phase, worker, "lost", f"the worker was lost: {reason}", retry=True)

    def _on_first(self, message: FirstToken) -> None:
        run = self._run
        self._booking.prefilled(message.prefill, asyncio.get_running_loop().time(), message.cached)
        run.prefilled(message)
        self._fleet.breakers.succeeded(self._prefill.id)
        here = self._decode is None
        self._become(State.DECODING if here else State.HANDING_OVER)
        if here:
            self._pause_again()
        for first in message.first:
            self.token(
                Token(self._handle, first.index, 0, first.token, first.finish, first.logprob)
            )

    def _arrived(self) -> None:
        """The sequences are where they are decoded."""
        self._landed = time.monotonic()
        self._booking.landed()
        self._pause_again()

    def _gave_all(self, worker: Worker) -> bool:
        """Whether it only prefilled, the prefix has landed, and the first tokens are here."""
        elsewhere = self._decode is not None and worker is self._prefill
        landed = elsewhere and self._landed is not None
        return landed and all(line.generated for line in self._lines.values())

    def _on_failed(self, worker: Worker, message: Failed) -> None:
        if message.code == FENCED:
            if not self._over.done():
                self._over.set_exception(TakenOver(self._run.job.id))
            return
        if self._gave_all(worker):
            return
        if message.indexes is None:
            detail = f"{message.code}: {message.detail}"
            self._fail(message.phase, worker, message.code, detail, retry=message.retry)
            return
        self._blame(message.phase, worker, message.code, message.detail)
        given_up = [
            line
            for index in message.indexes
            if (line := self._lines.pop(index, None)) is not None and not line.ended
        ]
        for line in given_up:
            line.leg = None
        log.info(
            "sequence.preempted",
            request=self._run.job.id,
            worker=worker.id,
            indexes=message.indexes,
            code=message.code,
        )
        if given_up:
            self._orphaned(given_up)
        self._end_if_over()

    # ---- inside

    def _accept(self, line: Line, row: Token) -> None:
        finish = row.finish
        line.generated.append(row.token)
        if not self._timed:
            self._note_times()
        stopped = line.take(row.token, finish, row.logprob)
        if stopped and finish is None:
            self._stop(line.index)
        if stopped or finish is not None:
            line.ended = True
            self._end_if_over()

    def _catch_up(self, line: Line) -> None:
        """Take what has waited for its place."""
        while not line.ended and (row := line.early.pop(len(line.generated), None)) is not None:
            self._accept(line, row)

    def _note_times(self) -> None:
        """When the first token came, and how long after the landing the first step."""
        run = self._run
        if run.first_token is None:
            run.first_token = time.monotonic()
        elif run.timeline.first_step is None and self._landed is not None:
            run.timeline.first_step = time.monotonic() - self._landed
        self._timed = self._decode is None or run.timeline.first_step is not None

    def _stop(self, index: int) -> None:
        """Have the workers end a sequence that the listener has seen enough of."""
        self._stopped = True
        if index not in self._told and (self._landed or self._decode is None):
            self._told.add(index)
            decode = self._decode or self._prefill
            decode.send(Cancel(handle=self._handle, indexes=(index,)))

    def _end_if_over(self) -> None:
        if all(line.ended for line in self._lines.values()) and not self._over.done():
            if self._lines:
                self._become(State.DONE)
            self._over.set_result(None)

    def _become(self, state: State) -> None:
        # Lives of a leg that was split by a preemption, or overtaken, may be there already.
        if self._life.state not in (state, State.DECODING, State.DONE) or state is State.DONE:
            self._life.become(state)

    def _fail(self, phase: str, worker: Worker, code: str, cause: str, *, retry: bool) -> None:
        if self._over.done():
            return
        self._blame(phase, worker, code, cause)
        failure = LegFailed(
            phase,
            worker.id,
            cause,
            retry=retry,
            avoid=frozenset(one.id for one in self._workers if one is worker or phase == "handoff"),
            full=code == "full",
            draining=worker.draining,
        )
        self._over.set_exception(failure)

    def _blame(self, phase: str, worker: Worker, code: str, cause: str) -> None:
        match culprit(phase, code):
            case "pair" if self._decode is not None:
                pair = (self._prefill.id, self._decode.id)
                self._fleet.breakers.failed(pair, cause, self._began)
            case "worker" | "pair":
                self._fleet.breakers.failed(worker.id, cause, self._began)
