"""Carry one request through queue, prefill, handoff and decode, whatever happens on the way.

A job's sequences travel together in one leg. When a leg fails, those that have not ended start
another one elsewhere, from exactly the tokens they have; once they have diverged, each alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import inf

import msgspec
import structlog

from gateway.admission import Admission, Ticket
from gateway.errors import (
    ContinuationLost,
    DeadlineExceeded,
    Draining,
    GatewayError,
    TakenOver,
    WorkerFailed,
)
from gateway.life.adoption import AdoptedLeg, Adoption, Found
from gateway.life.failure import LegFailed
from gateway.life.fleet import Fleet
from gateway.life.history import History
from gateway.life.job import Job, Listener, Timeline
from gateway.life.leg import Leg
from gateway.life.line import Line, Run
from gateway.life.placing import Placed, Placing
from gateway.life.states import Life, State
from gateway.resume import JobClaim

log = structlog.get_logger()

ROOM_SECONDS = 1.0
Apart = Callable[[list[Line]], None]
GONE = "this gateway is shutting down"


class Relay:
    """Fulfils `job.Carrier`."""

    def __init__(
        self,
        admission: Admission,
        fleet: Fleet,
        *,
        max_retries: int,
        worker_wait_seconds: float,
    ) -> None:
        self._admission = admission
        self._fleet = fleet
        self._max_retries = max_retries
        self._worker_wait = worker_wait_seconds
        self._placing = Placing(fleet, worker_wait_seconds=worker_wait_seconds)
        self.history = History()
        self.draining = False
        self._gone = asyncio.Event()
        self._runs: dict[Job, Run] = {}

    @property
    def running(self) -> int:
        """Jobs under way, those that wait included."""
        return len(self._runs)

    def drain(self) -> None:
        """Say that this gateway is about to leave; jobs that come all the same are carried."""
        self.draining = True

    def give_up(self) -> None:
        """Fail every job that has not ended, and all that come, so that their clients are told."""
        self._gone.set()
        now = asyncio.get_running_loop().time()
        for run in self._runs.values():
            if run.timer is not None:
                run.timer.reschedule(now)

    async def carry(self, job: Job, listener: Listener) -> Timeline:
        """See `job.Carrier.carry`."""
        if self._gone.is_set():
            raise Draining(GONE)
        run = self._runs[job] = Run.of(job, listener)
        self.history.begin(job, run.record)
        life = run.begin()
        began = time.monotonic()
        try:
            async with asyncio.timeout_at(job.deadline) as run.timer:
                await self._bring_home(run, life)
        except TimeoutError:
            if self._gone.is_set():
                run.end(State.FAILED)
                raise Draining(GONE) from None
            phase = run.end(State.EXPIRED)
            raise DeadlineExceeded(phase.replace("_", " ")) from None
        except Exception:
            run.end(State.FAILED)
            raise
        finally:
            run.end(State.CANCELLED)  # what has not ended otherwise
            run.release(run.keepers, False)  # what has, on workers, if not all of it has
            del self._runs[job]
            self.history.end(job)
            if run.first_token is not None:
                run.timeline.first_token = run.first_token - began
        log.info(
            "request.finished",
            request=job.id,
            prompt_tokens=len(job.prompt),
            generated_tokens=run.generated_tokens,
            total_ms=_ms(time.monotonic() - began),
            placed=run.record.reason,
            **_in_ms(run.timeline),
        )
        return run.timeline

    def pause(self, job: Job, index: int, paused: bool) -> None:
        """See `job.Carrier.pause`."""
        run = self._runs.get(job)
        if run is not None and index < len(run.lines):
            line = run.lines[index]
            line.paused = paused
            if line.leg is not None:
                line.leg.pause(index, paused)

    # ---- ways to begin

    async def _bring_home(self, run: Run, life: Life) -> None:
        claim = run.job.claim
        if claim is None:
            await self._start(run, life, run.lines)
            return
        try:
            if claim.resumed:
                await self._resume(run, life, claim)
            else:
                await self._start_claimed(run, life, claim)
        except ExceptionGroup as group:
            raise _first_error(group) from None
        keepers, run.keepers = run.keepers, []
        claim.ended(run.answer, partial(run.release, keepers))

    async def _start(self, run: Run, life: Life, lines: Sequence[Line]) -> None:
        """Wait for the job's turn, then bring `lines` to their end."""
        job, began = run.job, time.monotonic()
        ticket = _ticket(job, self._placing.needs(job))
        async with self._admission.turn(
            ticket, told=job.told, generated=lambda: run.generated_tokens
        ) as grant:
            run.timeline.queue = time.monotonic() - began
            run.grant = grant
            if job.claim is not None:
                await job.claim.secured()
            life.become(State.PLACED)
            await self._together(run, partial(self._finish, run, life, list(lines)))

    async def _start_claimed(self, run: Run, life: Life, claim: JobClaim) -> None:
        """As `_start`, while the record is being entered; ends when there is one already."""
        async with asyncio.TaskGroup() as beside:
            beside.create_task(claim.secured())
            await self._start(run, life, run.lines)

    async def _resume(self, run: Run, life: Life, claim: JobClaim) -> None:
        """Go on with what workers keep; compute again what none does."""
        if claim.answer is not None:
            run.replay(claim.answer)
            for state in (State.PLACED, State.DECODING, State.DONE):
                life.become(state)
            return
        adoption = Adoption(self._fleet, claim, run.job.n)
        try:
            found = await adoption.find(self._worker_wait) if run.kept else []
            adopted = {index for one in found for index in one.indexes}
            async with self._leased(run, found, all(it.index in adopted for it in run.lines)):
                await self._together(run, partial(self._go_on, run, life, found))
        finally:
            adoption.close()

    @asynccontextmanager
    async def _leased(self, run: Run, found: list[Found], whole: bool) -> AsyncIterator[None]:
        """Hold the job's lease, as soon as the queue has one: what was adopted needs no turn.

        Unless a part of it must be computed again (not `whole`), which has a turn of its own.
        """
        async with asyncio.TaskGroup() as beside:
            holding = beside.create_task(self._hold(run, found)) if whole else None
            yield
            if holding is not None:
                holding.cancel()

    async def _hold(self, run: Run, found: list[Found]) -> None:
        """Be in the queue's books until cancelled.

        Raises:
            TakenOver: another gateway has the job.
        """
        ticket = msgspec.structs.replace(_ticket(run.job, 0.0), first_token_by=inf)
        try:
            async with self._admission.turn(
                ticket, generated=lambda: run.generated_tokens
            ) as run.grant:
                if all(one.stage != "prefilling" for one in found):
                    run.grant.prefilled()
                await asyncio.get_running_loop().create_future()
        except TakenOver:
            raise
        except GatewayError as error:
            log.info("request.unleased", request=run.job.id, cause=str(error))

    async def _go_on(self, run: Run, life: Life, found: list[Found], apart: Apart) -> None:
        adopted = {index for one in found for index in one.indexes}
        missing = [line for line in run.lines if line.index not in adopted]
        async with asyncio.TaskGroup() as tasks:
            for one in found:
                lines = [line for line in run.lines if line.index in one.indexes]
                part = run.begin(State.PLACED)
                leg = AdoptedLeg(self._fleet, run, part, lines, one, apart)
                tasks.create_task(self._finish(run, part, lines, apart, leg))
            if missing:
                await self._start(run, life, missing)
            else:
                run.lives.remove(life)

    # ---- legs

    async def _together(self, run: Run, first: Callable[[Apart], Awaitable[None]]) -> None:
        """Bring all lines to their end; lines that must go apart do so side by side."""
        try:
            async with asyncio.TaskGroup() as journeys:

                def apart(lines: list[Line]) -> None:
                    for line in lines:
                        life = run.begin(State.PLACED)
                        journey = self._finish(run, life, [line], apart)
                        try:
                            journeys.create_task(journey)
                        except RuntimeError:  # all journeys are being ended, and this one with them
                            journey.close()

                await first(apart)
        except ExceptionGroup as group:
            raise _first_error(group) from None

    async def _finish(
        self,
        run: Run,
        life: Life,
        lines: list[Line],
        apart: Apart,
        leg: Leg | None = None,
    ) -> None:
        """Start legs for `lines` until they have ended; `leg` is the first, if there is one."""
        failures = 0
        avoid: frozenset[str] = frozenset()
        while lines:
            if leg is None:
                placed = await self._placing.place(run, lines, avoid)
                _check_exact(run, lines, placed)
                leg = Leg(self._fleet, run, life, lines, placed, apart)
            try:
                await leg.go()
            except LegFailed as failure:
                avoid = failure.avoid
                if failure.full:
                    await self._until_room(run, life, failure)
                else:
                    failures += failure.counts
                    self._after_failure(run, failure, failures)
                    run.timeline.retries += failure.counts
                life.become(State.PLACED)
            lines = [line for line in lines if not line.ended and line.leg is leg]
            leg = None
            if len(lines) > 1 and any(len(line.generated) > 1 for line in lines):
                apart(lines)
                break
        if life.state is not State.DONE:
            run.lives.remove(life)  # its lines have lives of their own now

    def _after_failure(self, run: Run, failure: LegFailed, failures: int) -> None:
        run.record.failed(str(failure))
        log.log(
            logging.WARNING if failure.counts else logging.INFO,
            "leg.failed",
            request=run.job.id,
            phase=failure.phase,
            worker=failure.worker,
            cause=failure.cause,
            retry=failure.retry,
        )
        if not failure.retry or failures > self._max_retries:
            raise WorkerFailed(failure.phase, failure.worker, failure.cause) from failure

    async def _until_room(self, run: Run, life: Life, failure: LegFailed) -> None:
        """A worker was full: go back into the queue, unless other sequences hold the job's lease.

        Raises:
            GatewayError: it cannot be granted again; see `Grant.again`.
        """
        entered = time.monotonic()
        if run.grant is not None and run.alone(life):
            life.become(State.QUEUED)
            kind = "decode" if failure.phase == "reserve" else "prefill"
            await run.grant.again(failure.worker, kind)
        else:
            try:
                async with asyncio.timeout(ROOM_SECONDS):
                    await self._fleet.changed()
            except TimeoutError:
                pass
        if run.first_token is None:
            run.timeline.queue = (run.timeline.queue or 0.0) + time.monotonic() - entered


def _check_exact(run: Run, lines: list[Line], placed: Placed) -> None:
    """What the client has, and nobody knows any more, must come out the same again.

    Raises:
        ContinuationLost: these workers cannot promise that.
    """
    claim = run.job.claim
    if claim is None or all(claim.knows(it.index) <= len(it.generated) for it in lines):
        return
    for worker in (placed.prefill, placed.decode):
        info = worker.welcome.info if worker is not None else None
        if info is not None and (info.rng, info.continuation) != ("positional", "exact"):
            placed.booking.end(asyncio.get_running_loop().time())
            raise ContinuationLost(
                "the workers that had this request are gone, and no others give the same tokens"
            )


def _ticket(job: Job, needs_seconds: float) -> Ticket:
    return Ticket(
        id=job.id,
        model=job.model,
        tenant=job.tenant,
        prefill_tokens=len(job.prompt),
        decode_tokens=len(job.prompt) + job.n * job.decode_estimate,
        expected_tokens=job.n * job.decode_estimate,
        deadline=job.deadline,
        first_token_by=job.first_token_by,
        needs_seconds=needs_seconds,
        priority=job.priority,
        terms=job.terms,
        counts=job.counts,
        name=job.claim.name if job.claim is not None else "",
        owner_epoch=job.claim.epoch if job.claim is not None else 0,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _in_ms(timeline: Timeline) -> dict[str, float | int | str]:
    """The phases as fields of a log event; those that did not happen are left out."""
    fields: dict[str, float | int | str] = {}
    for name in (*Timeline.__struct_fields__, "unaccounted"):
        value = getattr(timeline, name)
        if isinstance(value, float):
            fields[f"{name}_ms"] = _ms(value)
        elif value:
            fields[name] = value
    return fields


def _first_error(group: ExceptionGroup[Exception]) -> Exception:
    """The reason a job failed: one of ours where there is one, else the bug."""
    leaves: list[Exception] = []
    queue: list[Exception] = [group]
    while queue:
        error = queue.pop(0)
        if isinstance(error, ExceptionGroup):
            queue += error.exceptions
        else:
            leaves.append(error)
    ours = [error for error in leaves if isinstance(error, GatewayError)]
    bugs = [error for error in leaves if not isinstance(error, GatewayError | TimeoutError)]
    return (bugs or ours or leaves)[0]
