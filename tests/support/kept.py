"""Backends that go from one worker to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from backends.api import DecodeJob, Events, Output, PrefillJob
from tests.support.patience import PATIENCE_SECONDS


class Kept:
    """A stepped backend that its worker does not close."""

    def __init__(self, backend: Any) -> None:
        self.info, self.pool, self.step = backend.info, backend.pool, backend.step
        self.ingest, self.copy_blocks = backend.ingest, backend.copy_blocks

    def close(self) -> None: ...


class KeptEngine:
    """An engine that its worker does not close, and that answers to whoever hosts it now."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.info, self.pool = backend.info, backend.pool
        self.open: set[str] = set()
        self.imported_jobs = 0
        self.events: Events | None = None
        self.before = 0
        backend.start(self)

    def start(self, events: Events) -> None:
        self.before += 1
        self.events = events

    def prefill(self, job: PrefillJob) -> None:
        self.open.add(job.name)
        self.backend.prefill(job)

    def decode(self, job: DecodeJob) -> None:
        self.open.add(job.name)
        self.backend.decode(job)

    def abort(self, job: str) -> None:
        self.backend.abort(job)

    def pins(self) -> Mapping[str, int]:
        return self.backend.pins()

    def close(self) -> None:
        for job in [*self.open]:
            self.backend.abort(job)

    def end(self) -> None:
        self.backend.close()

    async def idle(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Return once it has said of every job that it is over."""
        async with asyncio.timeout(seconds):
            while self.open:
                await asyncio.sleep(0.01)

    # ---- what it tells

    def ready(self, job: str, start: int, end: int, layer: int | None = None) -> None:
        self.events.ready(job, start, end, layer)

    def prefilled(self, job: str, output: Output, cached: int = 0) -> None:
        self.events.prefilled(job, output, cached)

    def imported(self, job: str) -> None:
        self.imported_jobs += 1
        self.events.imported(job)

    def decoded(self, tokens: Any) -> None:
        self.events.decoded(tokens)

    def failed(self, job: str, error: Exception) -> None:
        self.events.failed(job, error)

    def ended(self, job: str) -> None:
        self.open.discard(job)
        self.events.ended(job)

    def died(self, reason: str) -> None:
        self.events.died(reason)
