"""Tell gateways which prefixes are kept here, so that they can send others like them.

A gateway hears of everything when it connects, and of changes soon after they happen. It is advice:
what a request finds is looked up when it comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from backends.chain import pack
from backends.host.prefixes import Prefixes
from backends.protocol import MOST_MARKS, Cached, Link

NEWS_SECONDS = 0.05
"""How long changes are gathered."""


class Publisher:
    """Follows the changes of one worker's prefixes for all gateways that want to know."""

    def __init__(self) -> None:
        self._prefixes: Prefixes | None = None
        self._numbers: dict[Link, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self, prefixes: Prefixes) -> None:
        """Tell of these from now on."""
        self._prefixes = prefixes

    def changed(self) -> None:
        """There is something to tell."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(NEWS_SECONDS, self._tell)

    def follow(self, link: Link) -> None:
        """Tell a gateway of everything, then of changes."""
        self._tell()
        self._numbers[link] = 0
        marks = self._prefixes.marks() if self._prefixes is not None else []
        for first in range(0, max(1, len(marks)), MOST_MARKS):
            some = pack(marks[first : first + MOST_MARKS])
            self._send(link, added=some, fresh=not first)

    def leave(self, link: Link) -> None:
        """A gateway is gone. Safe to call for others."""
        self._numbers.pop(link, None)

    def close(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for added, removed in self._news():
            for link in self._numbers:
                self._send(link, added=added, removed=removed)

    def _news(self) -> Iterator[tuple[bytes, bytes]]:
        added, removed = self._prefixes.news() if self._prefixes is not None else ([], [])
        for first in range(0, max(len(added), len(removed)), MOST_MARKS):
            some = slice(first, first + MOST_MARKS)
            yield pack(added[some]), pack(removed[some])

    def _send(self, link: Link, *, added: bytes, removed: bytes = b"", fresh: bool = False) -> None:
        number = self._numbers[link]
        self._numbers[link] = number + 1
        link.send(Cached(number=number, added=added, removed=removed, fresh=fresh))
