"""A worker's book of who holds which blocks, and why. It always balances.

A block is free or has one holder or several (sequences that share a prefix). Besides, it may be
*cached*: kept for later prefixes by `prefixes.py`. One that is cached and has no other holder is
*idle*, and counts as free: it is taken when no other is left, the longest idle first. Only the
event loop touches the book, so that no moment exists in which a block is counted nowhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from backends.errors import PoolExhausted

Reason = Literal["prefill", "landing", "reused", "headroom", "decode", "quarantine", "cached"]


class Holder(msgspec.Struct, frozen=True):
    """Why some blocks are not free, and for whom."""

    reason: Reason
    owner: str


def _nobody(block: int) -> None:
    """Hears of evictions where nothing is cached."""


class Ledger:
    """The book of one pool. `evicted` hears of each idle block that is taken."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._held: dict[Holder, list[int]] = {}
        self._holders = [0] * blocks
        self._free = list(range(blocks))  # a heap: the lowest first, so that runs stay adjacent
        self._cached: set[int] = set()
        self._idle: dict[int, None] = {}  # the longest idle first
        self.evicted: Callable[[int], None] = _nobody

    @property
    def free(self) -> int:
        """Blocks that nobody holds, idle ones included."""
        return len(self._free) + len(self._idle)

    def take(self, count: int, holder: Holder) -> list[int]:
        """`count` free blocks, now also held by `holder`.

        Raises:
            PoolExhausted: fewer are free; nothing was taken.
        """
        if count > self.free:
            raise PoolExhausted(f"{count} blocks wanted, {self.free} of {self.blocks} free")
        if not count:
            return []
        while count > len(self._free):
            block = next(iter(self._idle))
            self.uncache(block)
            self.evicted(block)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._hold(taken, holder)
        return taken

    def share(self, blocks: Iterable[int], holder: Holder) -> None:
        """Let `holder` hold blocks that somebody else holds already, or that are cached."""
        shared = list(blocks)
        for block in shared:
            if not self._holders[block] and block not in self._idle:
                raise ValueError(f"block {block} is free and cannot be shared")
        self._hold(shared, holder)

    def cache(self, block: int) -> None:
        """Keep a block that is held when its holders let go."""
        if not self._holders[block]:
            raise ValueError(f"block {block} is not held and cannot be kept")
        self._cached.add(block)

    def uncache(self, block: int) -> None:
        """Keep a block no longer; an idle one becomes free. Safe to call twice."""
        self._cached.discard(block)
        if block in self._idle:
            del self._idle[block]
            heapq.heappush(self._free, block)

    def move(self, old: Holder, new: Holder) -> None:
        """Give all that `old` holds to `new`; it is never free in between."""
        blocks = self._held.pop(old, None)
        if blocks:
            self._held.setdefault(new, []).extend(blocks)

    def release(self, holder: Holder) -> int:
        """End all that `holder` holds; how many blocks became free or idle. Safe to call twice.

        Of blocks that become idle together the last ones were taken last, and are evicted first:
        what is left of a prefix is its beginning.
        """
        freed = 0
        for block in reversed(self._held.pop(holder, [])):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            freed += 1
            if block in self._cached:
                self._idle[block] = None
            else:
                heapq.heappush(self._free, block)
        return freed

    def held_for(self, *reasons: Reason) -> int:
        """Holdings for any of `reasons`; a shared block counts once for each holder."""
        return sum(len(b) for holder, b in self._held.items() if holder.reason in reasons)

    def holders(self) -> tuple[tuple[str, str, int], ...]:
        """(reason, owner, blocks) of every holder, and how many blocks are cached and idle."""
        held = [(h.reason, h.owner, len(b)) for h, b in self._held.items()]
        if self._cached:
            held.append(("cached", f"{len(self._idle)} of them idle", len(self._cached)))
        return tuple(held)

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
        free, idle = set(self._free), self._idle.keys()
        if len(free) != len(self._free):
            wrong.append("a block is free twice")
        wrong += [f"block {b} is free and held" for b in free | idle if counts[b]]
        wrong += [f"block {b} is free and cached" for b in free & self._cached]
        wrong += [f"block {b} is idle and not cached" for b in idle - self._cached]
        wrong += [
            f"block {b} is neither free nor held"
            for b, count in enumerate(counts)
            if not count and b not in free and b not in idle
        ]
        return wrong

    def _hold(self, blocks: list[int], holder: Holder) -> None:
        self._held.setdefault(holder, []).extend(blocks)
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)
