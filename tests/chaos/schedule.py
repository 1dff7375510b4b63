"""Schedules: which faults strike whom, where and when, all of it derived from one integer.

Every random choice is a hash of the seed and of what it is for, so that taking a fault or an
actor out of a schedule changes nothing else in it: that is what makes schedules shrink.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec

MASK = (1 << 64) - 1


class Fault(msgspec.Struct, frozen=True, order=True):
    """`kind` strikes `actor` when it passes `point` for the `nth` time, counted from 1.

    `amount` is between 0 and 1; the scenario makes seconds, places or variants of it.
    """

    actor: int
    point: str
    nth: int
    kind: str
    amount: float

    def __str__(self) -> str:
        nth = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.kind} ({self.amount:.2f}) at {self.point}{nth} of actor {self.actor}"


class Schedule(msgspec.Struct, frozen=True):
    """One game: a seed, the actors that take part, and the faults that strike them."""

    seed: int
    actors: tuple[int, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        lines = [f"schedule {self.seed}: actors {', '.join(map(str, self.actors))}"]
        return "\n  ".join([*lines, *map(str, self.faults)])


Menu = Mapping[str, Sequence[str]]
"""Which kinds of fault may strike at which point."""


class Approach(msgspec.Struct, frozen=True):
    """How to get an actor into a rare state: faults as (point, nth, kind, amount), and where the
    next fault must then strike to find it there.
    """

    faults: tuple[tuple[str, int, str, float], ...]
    then: tuple[tuple[str, int], ...]


class Dice:
    """Numbers that depend on the seed and on what they are for, and on nothing else."""

    def __init__(self, seed: int) -> None:
        self._seed = _mix(seed + 1)

    def __call__(self, *purpose: int | str) -> float:
        """A number from 0 to 1, 1 excluded."""
        state = self._seed
        for part in purpose:
            number = part if isinstance(part, int) else _number(part)
            state = _mix(state ^ (number + 1))
        return state / (1 << 64)

    def below(self, limit: int, *purpose: int | str) -> int:
        """An integer from 0 to `limit`, `limit` excluded."""
        return int(self(*purpose) * limit)

    def choose(self, options: Sequence[Any], *purpose: int | str) -> Any:
        """One of `options`."""
        return options[self.below(len(options), *purpose)]


def draw(
    seed: int, actors: Sequence[int], menu: Menu, approaches: Sequence[Approach] = ()
) -> Schedule:
    """The schedule of this seed. One in 16 has no faults, and in every one some actors have none.

    The faults of an actor are independent of each other, or an approach and what follows it; all
    that can follow some approach is equally likely.
    """
    if seed % 16 == 0:
        return Schedule(seed, tuple(actors), ())
    dice = Dice(seed)
    endings = [
        (approach, point, nth, kind)
        for approach in approaches
        for point, nth in approach.then
        for kind in menu[point]
    ]
    faults: list[Fault] = []
    for actor in actors:
        if endings and dice("approach", actor) < 0.45:
            approach, point, nth, kind = dice.choose(endings, "which", actor)
            faults += (Fault(actor, *it) for it in approach.faults)
            faults.append(Fault(actor, point, nth, kind, dice("amount", actor)))
            continue
        for number in range(int(7 * dice("faults", actor) ** 2)):
            point = dice.choose(list(menu), "point", actor, number)
            nth = 1 + int(5 * dice("nth", actor, number) ** 3)
            kind = dice.choose(menu[point], "kind", actor, number)
            faults.append(Fault(actor, point, nth, kind, dice("amount", actor, number)))
    return Schedule(seed, tuple(actors), tuple(faults))


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """The smallest schedule found that still fails: no fault and no actor of it can be left out."""
    while True:
        smaller = _without(schedule, "faults", fails)
        smaller = _without(smaller, "actors", fails)
        if smaller == schedule:
            return schedule
        schedule = smaller


def _without(schedule: Schedule, field: str, fails: Callable[[Schedule], bool]) -> Schedule:
    """Delta debugging over one list: leave out halves, then quarters, then single items."""
    items: tuple[Any, ...] = getattr(schedule, field)
    size = max(1, len(items) // 2)
    while items:
        for candidate in _holes(items, size):
            attempt = _with(schedule, field, candidate)
            if fails(attempt):
                schedule, items = attempt, candidate
                break
        else:
            if size == 1:
                break
            size //= 2
        size = max(1, min(size, len(items) // 2))
    return schedule


def _with(schedule: Schedule, field: str, items: tuple[Any, ...]) -> Schedule:
    attempt = msgspec.structs.replace(schedule, **{field: items})
    if field == "actors":  # whoever does not take part is struck by nothing
        faults = tuple(it for it in attempt.faults if it.actor in items)
        attempt = msgspec.structs.replace(attempt, faults=faults)
    return attempt


def _holes(items: tuple[Any, ...], size: int) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(items), size):
        yield items[:start] + items[start + size :]


def _mix(value: int) -> int:
    """The finaliser of SplitMix64."""
    value &= MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


@cache
def _number(text: str) -> int:
    return _mix(zlib.crc32(text.encode()))
