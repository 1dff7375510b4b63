"""What is known of one request of the executor's, and waiting for more to be known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from backends.api import PrefillJob
from backends.errors import StepFailed
from backends.tensorrt_llm.messages import Finished


class Aborted(Exception):
    """The host wants no more of a job."""


class EngineDied(Exception):
    """The library as a whole cannot go on."""


class Carried:
    """One request of the executor's, and the job that it computes, if any."""

    def __init__(self, name: str, job: PrefillJob | None) -> None:
        self.name, self.job = name, job
        self.request: int | None = None
        self.results: list[Any] = []
        self.siblings: list[Carried] = []
        self.aborted = False
        self.leaving = False
        self.void = ""
        self.blocks = 0
        self.reused = 0
        self.told = 0
        self.exported: dict[int, int] = {}
        self.finished: Finished | None = None
        self.closed: set[int] = set()
        self.released: set[int] = set()
        self._changed = asyncio.Event()

    def change(self) -> None:
        """Something of it is another than before."""
        self._changed.set()

    async def until(self, true: Callable[[], bool], *, abortable: bool = True) -> None:
        """Wait for it.

        Raises:
            Aborted: nobody wants the job any more.
            StepFailed: some of its KV is lost.
        """
        while not true():
            if abortable:
                self.check()
            self._changed.clear()
            await self._changed.wait()

    def check(self) -> None:
        """Raises as `until`."""
        if self.aborted:
            raise Aborted
        if self.void:
            raise StepFailed(self.void)
