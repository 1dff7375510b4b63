"""What a gateway knows of the prefixes that one worker keeps: advice for placement."""

from __future__ import annotations

import structlog

from backends.protocol import Cached, unpack

log = structlog.get_logger()


class Known:
    """The marks of what is kept there, as far as it was told; at most `most` of them."""

    def __init__(self, worker: str, most: int) -> None:
        self.marks: set[int] = set()
        self._worker = worker
        self._most = most
        self._next: int | None = None

    def hear(self, message: Cached) -> None:
        """Follow what the worker says; after a gap, or too much, nothing until it begins anew."""
        if message.fresh:
            self.marks.clear()
            self._next = message.number
        if self._next != message.number:
            self._give_up("a message is missing")
            return
        self._next += 1
        self.marks.update(unpack(message.added))
        self.marks.difference_update(unpack(message.removed))
        if len(self.marks) > self._most:
            self._give_up(f"{len(self.marks)} are more than its pool has blocks")

    def _give_up(self, cause: str) -> None:
        if self._next is not None:
            log.warning("cache.unknown", worker=self._worker, cause=cause)
        self.marks.clear()
        self._next = None
