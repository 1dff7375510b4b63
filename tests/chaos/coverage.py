"""Which faults have struck where, and in which state of things: counted, printed, demanded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from tests.chaos.schedule import Menu

Cell = tuple[str, str, str]
"""A point, a state and a kind of fault."""


class Excuse(msgspec.Struct, frozen=True):
    """Why some combinations cannot occur. An empty tuple means all there are."""

    reason: str
    points: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def covers(self, cell: Cell) -> bool:
        """Whether it speaks of this (point, state, kind)."""
        asked = (self.points, self.states, self.kinds)
        return all(not some or it in some for it, some in zip(cell, asked, strict=True))


class Coverage:
    """Counts (point, state, kind) over many schedules."""

    def __init__(self, menu: Menu, states: Sequence[str], excuses: Sequence[Excuse]) -> None:
        self.counts: Counter[Cell] = Counter()
        self._menu = menu
        self._states = states
        self._excuses = excuses

    def note(self, point: str, state: str, kind: str) -> None:
        """A fault of `kind` struck."""
        self.counts[point, state, kind] += 1

    def cells(self) -> Iterator[Cell]:
        """Every combination that the menu allows, excused or not."""
        for point, kinds in self._menu.items():
            for state in self._states:
                for kind in kinds:
                    yield point, state, kind

    def missed(self) -> list[Cell]:
        """Combinations that should have been hit and were not."""
        return [it for it in self.cells() if not self.counts[it] and not self._excuse(it)]

    def false_excuses(self) -> list[Cell]:
        """Combinations that were hit although they are said to be impossible."""
        return [it for it in self.counts if self._excuse(it)]

    def table(self) -> str:
        """A line for each state and point, a column for each kind; letters name the excuses."""
        kinds = list(dict.fromkeys(kind for row in self._menu.values() for kind in row))
        widths = [max(6, len(kind)) for kind in kinds]
        head = [kind.rjust(width) for kind, width in zip(kinds, widths, strict=True)]
        lines = [f"{'point':9}{'landing':12}{' '.join(head)}"]
        for point, offered in self._menu.items():
            for state in self._states:
                row = [
                    (self._shown((point, state, kind)) if kind in offered else "").rjust(width)
                    for kind, width in zip(kinds, widths, strict=True)
                ]
                lines.append(f"{point:9}{state:12}{' '.join(row)}".rstrip())
        lines += [f"{_letter(n)}: {it.reason}" for n, it in enumerate(self._excuses)]
        hit = sum(1 for it in self.cells() if self.counts[it])
        lines.append(f"{hit} combinations hit, {len(self.missed())} missed")
        return "\n".join(lines)

    def _shown(self, cell: Cell) -> str:
        if self.counts[cell]:
            return str(self.counts[cell])
        return next((_letter(n) for n, it in enumerate(self._excuses) if it.covers(cell)), "MISSED")

    def _excuse(self, cell: Cell) -> Excuse | None:
        return next((it for it in self._excuses if it.covers(cell)), None)


def _letter(number: int) -> str:
    return chr(ord("a") + number)
