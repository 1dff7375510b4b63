"""llama.cpp's own memory as a cache of the pool: which of its sequences holds which blocks' KV.

The pool has the truth. Before a step each row gets a sequence that holds exactly what comes
before it: the one that computed or loaded it last, or another one that begins alike, whose cells
it shares, and the rest from the pool. After the step what was computed goes back to the pool. So
a sequence may be given up at any time, and nothing here asks which request a row belongs to.

Each write to a block gives it a new *stamp*; what is held under an old one is not used any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from backends.api import Row, StepFailed
from backends.llamacpp.state import Form, Numbers, State

SCRATCH = 0
"""The sequence through which states come and go; empty otherwise."""

IDLE_STEPS = 16
"""After so many steps without a row a sequence is given up: its cells slow down all others."""


class Memory(Protocol):
    """Sequences of cells, of which several sequences may have the same. All calls block."""

    def share(self, source: int, target: int, first: int, end: int) -> None:
        """Let `target` have the cells of `source` at positions `first` to `end`, too."""

    def drop(self, sequence: int) -> None:
        """Empty a sequence."""

    def clear(self) -> None:
        """Empty all."""

    def read(self, sequence: int, state: State) -> None:
        """Write the state of a sequence into `state`, which has as many cells."""

    def write(self, sequence: int, state: State) -> bool:
        """Fill an empty sequence; False: there is no room for it, and it is empty."""


@dataclass(slots=True, eq=False)
class Held:
    """A sequence that holds `tokens` tokens of these blocks, as they were under these stamps."""

    sequence: int
    used: int
    tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)


class Cells:
    """All sequences of one context, over a pool of shape [K|V, layer, block, token, number]."""

    def __init__(self, memory: Memory, form: Form, pool: Numbers, sequences: int) -> None:
        self._memory = memory
        self._form = form
        self._keys, self._values = pool
        self._size: int = pool.shape[3]
        self._free = list(range(sequences - 1, SCRATCH, -1))
        self._held: dict[int, Held] = {}
        self._stamps = [0] * pool.shape[2]
        self._count = itertools.count(1)
        self._turn = 0
        self._single = State(form, 1)

    def prepare(self, rows: Items[Row]) -> list[Held]:
        """A sequence for each row, with all of its KV before `start` and none after.

        Raises:
            StepFailed: there is no room.
        """
        self._turn += 1
        for held in [it for it in self._held.values() if self._turn - it.used > IDLE_STEPS]:
            self._give_up(held)
        found = self._continued(rows)
        return [found.get(number) or self._begin(row) for number, row in enumerate(rows)]

    def store(self, rows: Items[Row], helds: Items[Held]) -> None:
        """Bring what the rows computed to the pool."""
        for row, held in zip(rows, helds, strict=True):
            count = len(row.tokens)
            state = self._single if count == 1 else State(self._form, count)
            self._memory.share(held.sequence, SCRATCH, row.start, row.start + count)
            self._memory.read(SCRATCH, state)
            self._memory.drop(SCRATCH)
            state.check(row.start)
            for block, inside, place in self._pieces(row.blocks, row.start, count):
                self._keys[:, block, inside] = state.keys[:, place]
                self._values[:, block, inside] = state.values[:, place]
            self._extend(held, row)

    def written(self, blocks: Iterable[int]) -> None:
        """Others have written these blocks of the pool."""
        for block in blocks:
            self._stamps[block] = next(self._count)

    def shrink(self) -> bool:
        """Give up all sequences that the step has no row of; False: there were none."""
        idle = [held for held in self._held.values() if held.used != self._turn]
        for held in idle:
            self._give_up(held)
        return bool(idle)

    def forget(self) -> None:
        """Give up all: nobody knows what a step that failed has done."""
        self._memory.clear()
        self._free += self._held
        self._held.clear()

    # ---- whose KV is there

    def _continued(self, rows: Items[Row]) -> dict[int, Held]:
        """The rows that go on where a sequence ends, each with that one."""
        ends: dict[tuple[int, int], list[Held]] = {}
        for held in self._held.values():
            if held.tokens:
                ends.setdefault((held.tokens, held.blocks[-1]), []).append(held)
        found: dict[int, Held] = {}
        for number, row in enumerate(rows):
            if not row.start:
                continue
            for held in ends.get((row.start, row.blocks[(row.start - 1) // self._size]), ()):
                if held.used != self._turn and self._common(held, row) == row.start:
                    held.used = self._turn
                    found[number] = held
                    break
        return found

    def _begin(self, row: Row) -> Held:
        """A new sequence for this row: what another one has of it, and the rest from the pool."""
        new = self._open()
        if not row.start:
            return new
        best = max(self._held.values(), key=lambda it: self._common(it, row))
        common = self._common(best, row)
        if common:
            self._memory.share(best.sequence, new.sequence, 0, common)
        if common < row.start:
            self._load(new, row, common)
        covered = -(-row.start // self._size)
        new.tokens, new.blocks = row.start, list(row.blocks[:covered])
        new.stamps = [self._stamps[block] for block in new.blocks]
        return new

    def _common(self, held: Held, row: Row) -> int:
        """How many tokens before the row's are the same ones here."""
        same = 0
        for mine, its, stamp in zip(held.blocks, row.blocks, held.stamps, strict=False):
            if mine != its or self._stamps[its] != stamp:
                break
            same += 1
        return min(same * self._size, held.tokens, row.start)

    def _open(self) -> Held:
        if not self._free:
            self._give_up(min(self._held.values(), key=lambda it: it.used))
        new = Held(self._free.pop(), self._turn)
        self._held[new.sequence] = new
        return new

    def _give_up(self, held: Held) -> None:
        self._memory.drop(held.sequence)
        del self._held[held.sequence]
        self._free.append(held.sequence)

    def _extend(self, held: Held, row: Row) -> None:
        """The sequence has computed the row, and is the only one that knows its blocks by now."""
        first, end = row.start // self._size, row.start + len(row.tokens)
        covered = -(-end // self._size)
        self.written(row.blocks[first:covered])
        held.tokens = end
        held.blocks[first:] = row.blocks[first:covered]
        held.stamps[first:] = [self._stamps[block] for block in held.blocks[first:]]

    # ---- bytes

    def _load(self, held: Held, row: Row, first: int) -> None:
        count = row.start - first
        state = State(self._form, count)
        state.begin(first)
        for block, inside, place in self._pieces(row.blocks, first, count):
            state.keys[:, place] = self._keys[:, block, inside]
            state.values[:, place] = self._values[:, block, inside]
        while not self._memory.write(SCRATCH, state):
            if not self.shrink():
                raise StepFailed(f"llama.cpp has no room for {count} tokens")
        self._memory.share(SCRATCH, held.sequence, first, row.start)
        self._memory.drop(SCRATCH)

    def _pieces(
        self, blocks: Items[int], first: int, count: int
    ) -> Iterator[tuple[int, slice, slice]]:
        """Where positions `first` on lie: a block, the tokens inside it, which of them they are."""
        end, at = first + count, first
        while at < end:
            block, offset = divmod(at, self._size)
            taken = min(self._size - offset, end - at)
            yield (
                blocks[block],
                slice(offset, offset + taken),
                slice(at - first, at - first + taken),
            )
            at += taken
