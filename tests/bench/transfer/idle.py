"""The receiving half of those who stay within one process."""

from __future__ import annotations

from typing import Any

from tests.bench.transfer.cases import Case


class Idle:
    """Has nothing to do."""

    def __init__(self, case: Case, **options: Any) -> None:
        """Whatever the options."""

    async def offer(self) -> None:
        """Nothing."""

    async def meet(self, told: None) -> None:
        """Nobody."""

    async def expect(self, count: int) -> None:
        """Nothing."""

    async def take(self, count: int) -> None:
        """Nothing comes."""

    def arrived(self) -> bool:
        """The sending half has looked itself."""
        return True
