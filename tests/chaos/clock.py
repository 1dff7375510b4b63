"""An event loop whose time jumps to the next timer as soon as nothing is ready.

It has no selector and no sockets, and what a thread would do it does at once: what runs on it is a
pure function of its inputs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(Exception):
    """Nothing is ready and no timer is set: what was awaited will never come."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Begins at second 0. `complaints` are errors that nobody was there to catch."""

    def __init__(self) -> None:
        super().__init__()
        self.complaints: list[str] = []
        self._now = 0.0
        self._selector = self
        self._clock_resolution = 1e-9
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        """Seconds since this loop was made."""
        return self._now

    def select(self, timeout: float | None) -> Sequence[Any]:
        """What `BaseEventLoop` asks its selector: here it is time itself that passes.

        Raises:
            Stuck: it would wait for ever.
        """
        if timeout is None:
            waiting = sorted(str(task.get_coro()) for task in asyncio.all_tasks(self))
            raise Stuck(f"nothing more will happen; waiting: {', '.join(waiting)}")
        self._now += timeout
        return ()

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        """There are no threads; whoever asked hears of the result a little later all the same."""
        future: asyncio.Future[Any] = self.create_future()
        future.set_result(func(*args))
        return future

    def _process_events(self, event_list: Sequence[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context['message']}: {context.get('exception')!r}")


def play(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in virtual time.

    Raises:
        Stuck: it waits for what will never come.
        AssertionError: it left tasks behind, or an error that nobody caught.
    """
    loop = VirtualLoop()
    try:
        result = loop.run_until_complete(main)
        left = [str(task.get_coro()) for task in asyncio.all_tasks(loop)]
        assert not left, f"tasks left: {left}"
        assert not loop.complaints, f"nobody caught: {loop.complaints}"
        return result
    finally:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False
        loop.close()
