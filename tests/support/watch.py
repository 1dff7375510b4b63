"""Notice what keeps an event loop from its other work."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

LIMIT_SECONDS = 0.05


def slow_callbacks(work: Callable[[], Awaitable[Any]]) -> list[str]:
    """Run `work` on a loop of its own; callbacks that took longer than `LIMIT_SECONDS`, in words.

    Processor time of the loop's thread counts and not the clock's: a busy machine is no fault.
    Nor is what pytest has in memory: the collector passes over it, as it does in production.
    """
    found: list[str] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        seconds = time.thread_time() - began
        if seconds > LIMIT_SECONDS:
            found.append(f"{seconds * 1e3:.0f} ms in {_whose(handle)}")

    gc.collect()
    gc.freeze()
    asyncio.Handle._run = timed
    try:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(work())
    finally:
        asyncio.Handle._run = run
        gc.unfreeze()
    return found


def _whose(handle: asyncio.Handle) -> str:
    """The task whose step it was, where it was one's."""
    owner = getattr(handle._callback, "__self__", None)
    return repr(owner if isinstance(owner, asyncio.Task) else handle)
