"""Plays schedules of a scenario, and turns a failure into the shortest story that shows it."""

from __future__ import annotations

import gc
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

import msgspec
import structlog

from tests.chaos.clock import Stuck
from tests.chaos.coverage import Cell, Coverage
from tests.chaos.schedule import Dice, Fault, Schedule, draw, shrink

SHARE = 50
"""How many schedules a process plays at a time."""

Look = tuple[int | None, Counter[Cell]]
"""Which schedule of a share fails, if one does, and what struck."""


class Violation(AssertionError):
    """A promise was broken. Says which, by whom, and when."""


class Game(Protocol):
    """One schedule being played."""

    story: list[str]

    def play(self) -> None:
        """Play to the end and check everything.

        Raises:
            Violation: the first promise that was broken.
            Stuck: it waits for what will never come.
        """


class Scenario(Protocol):
    """What is played. `name` is what the command line calls it."""

    name: str

    def schedule(self, seed: int) -> Schedule:
        """The schedule that belongs to a seed."""

    def coverage(self) -> Coverage:
        """An empty table."""

    def game(self, schedule: Schedule, faults: Faults) -> Game:
        """Set up everything anew."""


class Plotted:
    """A scenario as a module tells it, in its MENU, APPROACHES, STATES and EXCUSES."""

    plot: Any
    concurrent = 8
    """How many actors a schedule has at least."""

    def schedule(self, seed: int) -> Schedule:
        """As `Scenario.schedule`."""
        actors = range(self.concurrent + seed % 3)
        return draw(seed, actors, self.plot.MENU, self.plot.APPROACHES)

    def coverage(self) -> Coverage:
        """As `Scenario.coverage`."""
        return Coverage(self.plot.MENU, self.plot.STATES, self.plot.EXCUSES)


class Faults:
    """The faults of one schedule, waiting for their moment."""

    def __init__(self, schedule: Schedule, coverage: Coverage | None) -> None:
        self.dice = Dice(schedule.seed)
        self._coverage = coverage
        self._passed: Counter[tuple[int, str]] = Counter()
        self._waiting: defaultdict[tuple[int, str, int], list[Fault]] = defaultdict(list)
        for fault in schedule.faults:
            self._waiting[fault.actor, fault.point, fault.nth].append(fault)

    def passing(self, actor: int, point: str, state: Callable[[], str]) -> list[Fault]:
        """`actor` passes `point`: the faults that strike it now, each of them once."""
        self._passed[actor, point] += 1
        faults = self._waiting.pop((actor, point, self._passed[actor, point]), [])
        if self._coverage is not None:
            for fault in faults:
                self._coverage.note(point, state(), fault.kind)
        return faults


class Failure(msgspec.Struct, frozen=True):
    """A schedule that breaks a promise, as short as it could be made."""

    schedule: Schedule
    found: Schedule
    cause: str
    story: tuple[str, ...]
    scenario: str

    def __str__(self) -> str:
        told = "\n    ".join(self.story)
        return (
            f"{self.cause}\n  {self.schedule}\n  what happened:\n    {told}\n"
            f"  replay: python -m tests.chaos {self.scenario} --seed {self.found.seed} (shrunk "
            f"from {len(self.found.faults)} faults and {len(self.found.actors)} actors)"
        )


def broken(scenario: Scenario, schedule: Schedule, coverage: Coverage | None = None) -> str:
    """Play one schedule. Returns which promise it broke; empty when it broke none."""
    return played(scenario, schedule, coverage)[0]


def explore(
    scenario: Scenario, seeds: Sequence[int], coverage: Coverage | None = None, *, jobs: int = 1
) -> Failure | None:
    """Play the schedules of `seeds` until one fails, and shrink that one.

    They are shared by `jobs` processes; whatever their number, the same failure is found. Those
    play each share in a copy of themselves, which takes its garbage with it unsorted.
    """
    shares = [seeds[at : at + SHARE] for at in range(0, len(seeds), SHARE)]
    look = partial(_look, scenario)
    with ExitStack() as stack:
        played = map(look, shares)
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(jobs, spawn, _warm_up, (scenario,))
            stack.callback(pool.shutdown, cancel_futures=True)
            played = pool.map(partial(_apart, look), shares)
        for found, counts in played:
            if coverage is not None:
                coverage.counts += counts
            if found is not None:
                return shortest(scenario, scenario.schedule(found))
    return None


def spare_us() -> None:
    """Log nothing: much fails on purpose. Every game leaves cycles; look for no older ones."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def _warm_up(scenario: Scenario) -> None:
    """Play once, so that what is made when it is first needed is there in every copy."""
    spare_us()
    broken(scenario, scenario.schedule(0))
    gc.collect()
    gc.freeze()


def _apart(look: Callable[[Sequence[int]], Look], seeds: Sequence[int]) -> Look:
    """What `look` finds in a copy of this process.

    Raises:
        EOFError: the copy died; it has said why.
    """
    fork = multiprocessing.get_context("fork")
    heard, tell = fork.Pipe(duplex=False)
    with heard:
        with tell:
            copy = fork.Process(target=_tell, args=(tell, look, seeds))
            copy.start()
        found: Look = heard.recv()
    copy.join()
    return found


def _tell(tell: Connection, look: Callable[[Sequence[int]], Look], seeds: Sequence[int]) -> None:
    gc.disable()
    tell.send(look(seeds))


def _look(scenario: Scenario, seeds: Sequence[int]) -> Look:
    """Play the schedules of `seeds`. Returns which of them fails, if one does, and what struck."""
    coverage = scenario.coverage()
    for seed in seeds:
        if broken(scenario, scenario.schedule(seed), coverage):
            return seed, coverage.counts
    return None, coverage.counts


def shortest(scenario: Scenario, schedule: Schedule) -> Failure:
    """Shrink a schedule that fails, and tell its story."""
    small = shrink(schedule, lambda it: bool(broken(scenario, it)))
    cause, story = played(scenario, small)
    return Failure(small, schedule, cause, tuple(story), scenario.name)


def played(
    scenario: Scenario, schedule: Schedule, coverage: Coverage | None = None
) -> tuple[str, list[str]]:
    """Play one schedule. Returns which promise it broke, if it did, and what happened."""
    game = scenario.game(schedule, Faults(schedule, coverage))
    try:
        game.play()
    except (Violation, Stuck) as error:
        return str(error) or type(error).__name__, game.story
    except Exception as error:  # what production code must not raise is a finding like others
        return f"{type(error).__name__}: {error}", game.story
    return "", game.story
