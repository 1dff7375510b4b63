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


OVERTAKEN_SECONDS = 1.0


class _Wait(msgspec.Struct, frozen=True, eq=False):
    """One that waits for room, and since when."""

    since: float


class Placed(msgspec.Struct, frozen=True):
    """The workers, and what is booked on them; whoever has it ends the booking."""

    prefill: Worker
    decode: Worker | None
    booking: Booking | Unbooked


class Placing:
    """Places for one gateway.

    Those that wait for room try in the order they came, and one may go before another that needs
    more of it; but not any more when that one has waited for `OVERTAKEN_SECONDS` and no limit on
    its first token will end its wait.
    """

    def __init__(self, fleet: Fleet, *, worker_wait_seconds: float) -> None:
        self._fleet = fleet
        self._worker_wait = worker_wait_seconds
        self._patient: dict[_Wait, None] = {}  # those that no limit ends, in the order they came

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
        entered, wait = time.monotonic(), _Wait(asyncio.get_running_loop().time())
        try:
            while not isinstance(answer := self._attempt(run, lines, avoid, wait), Placed):
                if answer.kind == "full" and run.job.first_token_by == inf:
                    self._patient[wait] = None
                await self._until_changed(run, answer, wait.since)
        finally:
            self._patient.pop(wait, None)
        run.timeline.place = time.monotonic() - entered
        return answer

    def _attempt(
        self, run: Run, lines: list[Line], avoid: frozenset[str], wait: _Wait
    ) -> Placed | Unplaceable:
        now = asyncio.get_running_loop().time()
        first = next(iter(self._patient), wait)
        held_up = first is not wait and run.first_token is None
        if held_up and now - first.since > OVERTAKEN_SECONDS:
            return Unplaceable("others have waited for room for longer", kind="full")
        seen = self._fleet.snapshot()
        wish = _wish(run, lines, avoid, seen, now)
        chosen = place(seen, wish)
        if isinstance(chosen, Placement):
            return self._book(run, chosen, wish)
        if chosen.field is not None:
            raise BadRequest(chosen.reason, field=chosen.field, code="unsupported_value")
        if chosen.kind == "late":
            raise DeadlineExceeded("queued", chosen.reason)
        return chosen

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
        run.timeline.emulated = " and ".join(
            sorted({it.emulated for it in (prefill, decode) if it is not None and it.emulated})
        )
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
        prompt_logprobs=job.prompt_logprobs is not None and not run.has_prompt_logprobs,
        avoid=avoid,
        marks=_marks(run, seen),
    )
