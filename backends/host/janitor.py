"""Cleanup that has to wait, done by someone who is not being cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Janitor:
    """Runs what is handed to it, each in a task of its own under one parent.

    `hand` never waits, so a `finally` can call it.
    """

    def __init__(self) -> None:
        self._errands: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._open = 0

    @property
    def errands(self) -> int:
        """How many are not done yet."""
        return self._open

    def hand(self, errand: Callable[[], Awaitable[None]]) -> None:
        """Have `errand` done soon."""
        self._open += 1
        self._errands.put_nowait(errand)

    async def run(self) -> None:
        """Work until cancelled. An errand that raises is a bug and ends the process."""
        async with asyncio.TaskGroup() as errands:
            while True:
                errands.create_task(self._do(await self._errands.get()))

    async def _do(self, errand: Callable[[], Awaitable[None]]) -> None:
        try:
            await errand()
        finally:
            self._open -= 1
