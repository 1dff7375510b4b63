"""An event loop in a thread of its own, whose tasks have one parent and whose end is told once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

log = structlog.get_logger()

JOIN_SECONDS = 10.0


class Background:
    """`post` and `spawn` from any thread; without effect once the loop has ended."""

    def __init__(self, died: Callable[[str], None]) -> None:
        """`died(why)` is called, on the loop's thread, when a task fails. Nothing goes on then."""
        self._died = died
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="tensorrt-llm")
        self._thread.start()
        self._ready.wait()

    def post(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have the loop call it."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            log.debug("engine.gone")

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have the loop do it."""
        self.post(lambda: self._tasks.create_task(work()))

    def close(self) -> None:
        """Cancel everything, and wait for that."""
        self.post(self._stop.set)
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseExceptionGroup as group:
            first: BaseException = group
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            log.error("engine.failed", cause=f"{type(first).__name__}: {first}")
            self._died(f"{type(first).__name__}: {first}")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with asyncio.TaskGroup() as self._tasks:
            parent = asyncio.current_task()
            assert parent is not None
            self._ready.set()
            await self._stop.wait()
            for task in asyncio.all_tasks() - {parent}:
                task.cancel()
