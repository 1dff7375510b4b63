"""Choose workers for the lines of a run, and wait where none can take them yet."""

from __future__ import annotations

import asyncio
import time
from math import inf

import msgspec
import structlog

from backends.protocol import chain, mark
from gateway.errors import BadRequest, DeadlineExceeded, NoWorkers
from gateway.life.fleet import Fleet
from gateway.life.job import Job
from gateway.life.line import Line, Run
from gateway.life.worker import Worker
from gateway.placement import (
    Booking,
    Placement,
    Snapshot,
    Unplaceable,
    Wish,
    least_seconds,
    place,
)

log = structlog.get_logger()

HURRY_SECONDS = 120.0  # no prompt takes longer, and an estimate for each costs time


class Unbooked:
    """In the place of a booking, for what was placed by somebody else."""

    def prefilled(self, seconds: float, now: float, cached: int = 0) -> None:
        """See `Booking.prefilled`."""

    def landed(self) -> None:
        """See `Booking.landed`."""

    def handed_over(self, count: int, seconds: float) -> None:
        """See `Booking.handed_over`."""

    def end(self, now: float) -> None:
        """See `Booking.end`."""


class Placed(msgspec.Struct, frozen=True):
    """The workers, and what is booked on them; whoever has it ends the booking."""

    prefill: Worker
    decode: Worker | None
    booking: Booking | Unbooked


class Placing:
    """Places for one gateway. Those that wait for room are served in the order they came."""

    def __init__(self, fleet: Fleet, *, worker_wait_seconds: float) -> None:
        self._fleet = fleet
        self._worker_wait = worker_wait_seconds
        self._line = asyncio.Lock()

    def needs(self, job: Job) -> float:
        """The least time, in seconds, that its first token needs; 0 when there is no hurry."""
        due = min(job.deadline, job.first_token_by)
        if due - asyncio.get_running_loop().time() > HURRY_SECONDS:
            return 0.0
        wish = Wish(
            tokens=len(job.prompt),
            sequences=job.n,
            sampling=job.sampling,
            decodes=job.max_tokens > 1,
        )
        return least_seconds(self._fleet.snapshot(), wish)

    async def place(self, run: Run, lines: list[Line], avoid: frozenset[str]) -> Placed:
        """Choose workers, waiting for some to be there and to have room.

        Raises:
            BadRequest: no worker that is there could ever do it.
            NoWorkers: none came in time.
            DeadlineExceeded: its first token would be late, or there was no room in time.
        """
        entered = time.monotonic()
        placed = None
        if run.first_token is not None or not self._line.locked():
            placed = await self._attempt(run, lines, avoid, waits=run.first_token is not None)
        if placed is None:
            async with self._line:
                placed = await self._attempt(run, lines, avoid, waits=True)
        assert placed is not None
        run.timeline.place = time.monotonic() - entered
        return placed

    async def _attempt(
        self, run: Run, lines: list[Line], avoid: frozenset[str], *, waits: bool
    ) -> Placed | None:
        """One place, or None where there is no room and it is not to be waited for."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            seen = self._fleet.snapshot()
            wish = _wish(run, lines, avoid, seen, loop.time())
            chosen = place(seen, wish)
            if isinstance(chosen, Placement):
                return self._book(run, chosen, wish)
            if chosen.field is not None:
                raise BadRequest(chosen.reason, field=chosen.field, code="unsupported_value")
            if chosen.kind == "late":
                raise DeadlineExceeded("queued", chosen.reason)
            if chosen.kind == "full" and not waits:
                return None
            await self._until_changed(run, chosen, began)

    async def _until_changed(self, run: Run, refusal: Unplaceable, began: float) -> None:
        loop = asyncio.get_running_loop()
        until = _due(run)
        if refusal.kind == "absent":
            until = min(until, began + self._worker_wait)
        try:
            async with asyncio.timeout_at(until):
                await self._fleet.changed()
        except TimeoutError:
            if loop.time() >= _due(run):
                raise DeadlineExceeded("queued", refusal.reason) from None
            raise NoWorkers(refusal.reason) from None

    def _book(self, run: Run, chosen: Placement, wish: Wish) -> Placed:
        prefill = self._fleet.worker(chosen.prefill)
        decode = self._fleet.worker(chosen.decode) if chosen.decode is not None else None
        assert prefill is not None
        run.timeline.prefill_worker = chosen.prefill
        run.timeline.decode_worker = chosen.decode or chosen.prefill
        run.record.placed(chosen)
        log.debug(
            "request.placed",
            request=run.job.id,
            prefill=chosen.prefill,
            decode=chosen.decode,
            reason=chosen.reason.summary,
        )
        return Placed(prefill, decode, self._fleet.book(chosen, wish))


def _due(run: Run) -> float:
    """When the next token must be there, in the loop's time; the last one for streams that run."""
    job = run.job
    return job.deadline if run.first_token is not None else min(job.deadline, job.first_token_by)


def _marks(run: Run, seen: Snapshot) -> dict[str, tuple[int, ...]]:
    """The marks of the prompt's prefixes in the layouts of workers that keep some; kept, too."""
    job = run.job
    for worker in seen.workers:
        layout = worker.info.layout
        if job.salt and worker.kept and layout.fingerprint not in run.marks:
            links = chain(layout, job.salt, job.prompt)
            run.marks[layout.fingerprint] = tuple(mark(link) for link in links)
    return run.marks


def _wish(run: Run, lines: list[Line], avoid: frozenset[str], seen: Snapshot, now: float) -> Wish:
    job = run.job
    generated = len(lines[0].generated)
    left = job.max_tokens - generated
    return Wish(
        tokens=len(job.prompt) + max(0, generated - 1),
        sequences=len(lines),
        sampling=job.sampling,
        expected=max(1, min(left, job.decode_estimate - generated)),
        # what has begun is brought to its end, however late
        first_token_seconds=_due(run) - now if run.first_token is None else inf,
        gap_seconds=job.gap_seconds,
        decodes=left > 1 or generated > 0,
        avoid=avoid,
        marks=_marks(run, seen),
    )
