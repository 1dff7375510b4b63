"""The engine contract around a fleet of servers: a task for each job, on a loop of its own.

Nothing is known of the fleet's memory: jobs hold no blocks that could be shown, and a job has
ended when its connection is closed. The arena is a formality: KV is neither imported nor exported.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar

import numpy as np

from backends.api import (
    BackendError,
    BackendInfo,
    DecodeJob,
    Events,
    Output,
    PrefillJob,
    Sampled,
)
from backends.checkpoint.checks import converted
from backends.served.fleet import Fleet, Options

END_SECONDS = 5.0


class ServedEngine:
    """Speaks for a fleet on the engine contract, from a thread of its own.

    A kind of servers is a subclass that names its `options` and its `fleet`. Its constructor takes
    what `options` declares:

    `decode` is the address of a server, such as `http://127.0.0.1:8000`; `prefill`, where it is
    given, that of another which computes the prompts for it. `model` is what they serve, for its
    vocabulary; `served_model` what they call it, if not by one name only. `capacity_tokens` may be
    in work at a time, `max_batch` sequences; `context_tokens` lowers what the servers allow. A
    server that says nothing for `silence_seconds` fails the request; that must be less than the
    worker's `step_timeout_seconds`. All must have said what they are within `open_seconds`.

    Raises:
        BackendMisconfigured: an option is wrong, or a server does not fit.
        BackendError: a server cannot be reached.
    """

    options: ClassVar[type[Options]] = Options
    fleet: ClassVar[type[Fleet]]

    def __init_subclass__(cls) -> None:
        # What a worker's options are checked against before it is made.
        cls.__signature__ = inspect.signature(cls.options)  # type: ignore[attr-defined]

    def __init__(self, **given: Any) -> None:
        options = converted(given, self.options)
        options.check()
        self._fleet = type(self).fleet(options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._fresh: list[tuple[str, Sampled]] = []
        self._events: Events | None = None
        try:
            opening = asyncio.run_coroutine_threadsafe(self._open(options.open_seconds), self._loop)
            self.info: BackendInfo = opening.result()
        except BaseException:
            self.close()
            raise
        # Never written to, so the machine gives no memory for it.
        self.pool: Any = np.zeros(self.info.layout.block_bytes * self.info.pool_blocks, np.uint8)

    def start(self, events: Events) -> None:
        """Answer to `events` from now on."""
        self._events = events

    def prefill(self, job: PrefillJob) -> None:
        """Refused: the fleet keeps its KV to itself."""
        raise BackendError("the servers of this worker do not give KV away: its role must be both")

    def decode(self, job: DecodeJob) -> None:
        """Take a sequence to decode in place."""
        if job.blocks:
            raise BackendError("the servers of this worker take no KV: its role must be both")
        self._loop.call_soon_threadsafe(self._begin, job)

    def abort(self, job: str) -> None:
        """Close the job's connection."""
        self._loop.call_soon_threadsafe(self._cancel, job)

    def pins(self) -> Mapping[str, int]:
        """Nothing is known of the servers' memory."""
        return {}

    def close(self) -> None:
        """Close every connection, and end the thread."""
        try:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(END_SECONDS)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_SECONDS)

    async def _open(self, seconds: float) -> BackendInfo:
        try:
            async with asyncio.timeout(seconds):
                return await self._fleet.open()
        except TimeoutError:
            raise BackendError(f"the servers did not answer within {seconds} s") from None

    async def _close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait([*self._tasks.values()])
        await self._fleet.close()

    def _begin(self, job: DecodeJob) -> None:
        # Its parent is this engine: `_close` ends whatever is left. A callback and no `finally`: a
        # task that is cancelled before it began runs neither.
        task = self._tasks[job.name] = self._loop.create_task(self._carry(job))
        task.add_done_callback(partial(self._end, job.name))

    def _cancel(self, job: str) -> None:
        if job in self._tasks:
            self._tasks[job].cancel()

    async def _carry(self, job: DecodeJob) -> None:
        events = self._events
        assert events is not None
        async with aclosing(self._fleet.generate(job)) as steps:
            async for step in steps:
                if step.prefilled:
                    events.prefilled(job.name, Output((), step.prompt_logprobs), step.cached)
                self._say(job.name, step.tokens)

    def _end(self, job: str, task: asyncio.Task[None]) -> None:
        del self._tasks[job]
        self._flush()
        assert self._events is not None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._events.failed(job, error)
        self._events.ended(job)

    def _say(self, job: str, tokens: tuple[Sampled, ...]) -> None:
        """Tokens of one moment are told together, as if one step had given them."""
        if tokens and not self._fresh:
            self._loop.call_soon(self._flush)
        self._fresh += [(job, token) for token in tokens]

    def _flush(self) -> None:
        fresh, self._fresh = self._fresh, []
        if fresh:
            assert self._events is not None
            self._events.decoded(fresh)
