"""Give a request's jobs to the carrier, all at once, and end them together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from gateway.api.choice import Choice
from gateway.api.tally import Tally
from gateway.errors import GatewayError, WorkerFailed
from gateway.life.job import Carrier, Job, Listener


async def carry_all(
    carrier: Carrier,
    jobs: Sequence[tuple[Job, Listener]],
    tasks: asyncio.TaskGroup,
    tally: Tally,
) -> None:
    """Return when all have ended; several run side by side, as children of `tasks`."""

    async def carry(job: Job, listener: Listener) -> None:
        tally.timelines.append(await carrier.carry(job, listener))

    if len(jobs) == 1:
        await carry(*jobs[0])
        return
    running = [tasks.create_task(carry(job, listener)) for job, listener in jobs]
    await asyncio.wait(running)


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
