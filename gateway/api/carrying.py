"""Give a request's jobs to the carrier, all at once, and end them together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from gateway.api.choice import Choice
from gateway.api.tally import Tally
from gateway.errors import GatewayError, WorkerFailed
from gateway.life.job import Carrier, Job, Listener


async def carry_all(carrier: Carrier, jobs: Sequence[tuple[Job, Listener]], tally: Tally) -> None:
    """Return when all have ended; several run side by side, and one that fails ends them all.

    Raises:
        GatewayError: the first that was raised.
    """
    if len(jobs) == 1:
        tally.timelines.append(await carrier.carry(*jobs[0]))
        return
    failure: GatewayError | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            for job, listener in jobs:
                tasks.create_task(_carry(carrier, job, listener, tally))
    except* GatewayError as group:
        failure = first_failure(group)
    if failure is not None:
        raise failure


async def _carry(carrier: Carrier, job: Job, listener: Listener, tally: Tally) -> None:
    tally.timelines.append(await carrier.carry(job, listener))


def check_finished(choices: Iterable[Choice], tally: Tally) -> None:
    """An answer without a reason for its end is none.

    Raises:
        WorkerFailed: a choice has not ended.
    """
    for choice in choices:
        if choice.continuation.finish is None:
            worker = tally.timelines[-1].decode_worker if tally.timelines else ""
            raise WorkerFailed("decode", worker, f"choice {choice.index} just stopped")


def first_failure(group: BaseExceptionGroup[GatewayError]) -> GatewayError:
    """The first error in `group`."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, GatewayError)
    return error
