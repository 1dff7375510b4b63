"""Having the executor make a turn, where it would not by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Turns:
    """Makes turns one after another; who asks while one is made gets the next."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._lock = asyncio.Lock()
        self._begun = self._over = 0

    async def one(self) -> None:
        """Return when a whole turn was made that began after this call."""
        wanted = self._begun + 1
        async with self._lock:
            if self._over >= wanted:
                return
            self._begun += 1
            await self._make()
            self._over = self._begun
