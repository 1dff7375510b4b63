"""A worker's book of who holds which blocks, and why. It always balances.

A block is free or has one holder or several (sequences that share a prefix). Only the event
loop touches the book, so that no moment exists in which a block is counted nowhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Literal

import msgspec

from backends.errors import PoolExhausted

Reason = Literal["prefill", "landing", "headroom", "decode", "quarantine"]


class Holder(msgspec.Struct, frozen=True):
    """Why some blocks are not free, and for whom."""

    reason: Reason
    owner: str


class Ledger:
    """The book of one pool."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._held: dict[Holder, list[int]] = {}
        self._holders = [0] * blocks
        self._free = list(range(blocks))  # a heap: the lowest first, so that runs stay adjacent

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int, holder: Holder) -> list[int]:
        """`count` free blocks, now also held by `holder`.

        Raises:
            PoolExhausted: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise PoolExhausted(f"{count} blocks wanted, {len(self._free)} of {self.blocks} free")
        if not count:
            return []
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._hold(taken, holder)
        return taken

    def share(self, blocks: Iterable[int], holder: Holder) -> None:
        """Let `holder` hold blocks that somebody else holds already."""
        shared = list(blocks)
        for block in shared:
            if not self._holders[block]:
                raise ValueError(f"block {block} is free and cannot be shared")
        self._hold(shared, holder)

    def move(self, old: Holder, new: Holder) -> None:
        """Give all that `old` holds to `new`; it is never free in between."""
        blocks = self._held.pop(old, None)
        if blocks:
            self._held.setdefault(new, []).extend(blocks)

    def release(self, holder: Holder) -> int:
        """End all that `holder` holds; how many blocks became free. Safe to call twice."""
        freed = 0
        for block in self._held.pop(holder, ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                heapq.heappush(self._free, block)
                freed += 1
        return freed

    def held_for(self, *reasons: Reason) -> int:
        """Holdings for any of `reasons`; a shared block counts once for each holder."""
        return sum(len(b) for holder, b in self._held.items() if holder.reason in reasons)

    def holders(self) -> tuple[tuple[str, str, int], ...]:
        """(reason, owner, blocks) of every holder."""
        return tuple((h.reason, h.owner, len(b)) for h, b in self._held.items())

    def audit(self) -> list[str]:
        """What does not balance, in words; empty when all is well."""
        counts = [0] * self.blocks
        for blocks in self._held.values():
            for block in blocks:
                counts[block] += 1
        wrong = [
            f"block {block}: {counted} holders, {noted} noted"
            for block, (counted, noted) in enumerate(zip(counts, self._holders, strict=True))
            if counted != noted
        ]
        free = set(self._free)
        if len(free) != len(self._free):
            wrong.append("a block is free twice")
        wrong += [f"block {b} is free and held" for b in free if counts[b]]
        wrong += [
            f"block {b} is neither free nor held"
            for b, count in enumerate(counts)
            if not count and b not in free
        ]
        return wrong

    def _hold(self, blocks: list[int], holder: Holder) -> None:
        self._held.setdefault(holder, []).extend(blocks)
        for block in blocks:
            self._holders[block] += 1
