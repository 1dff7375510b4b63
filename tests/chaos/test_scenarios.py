"""5,000 schedules of each scenario in which everything goes wrong, and nothing may come of it."""

import os
from typing import NamedTuple

import pytest

from tests.chaos.control.game import Control
from tests.chaos.control.mutants import MUTANTS as CONTROL_MUTANTS
from tests.chaos.handoffs.game import Handoffs
from tests.chaos.handoffs.mutants import MUTANTS as HANDOFF_MUTANTS
from tests.chaos.machine import broken, explore, played

SCHEDULES = 5000


class Played(NamedTuple):
    """A scenario, what may go wrong in its code, and how few combinations it may miss."""

    scenario: type[Handoffs] | type[Control]
    mutants: dict
    missed_share: float


PLAYED = {
    "handoffs": Played(Handoffs, HANDOFF_MUTANTS, 0.0),
    "control": Played(Control, CONTROL_MUTANTS, 0.01),
}
SHOWN_BY = {"reuses what it has not looked at": "rot"}
"""What must strike for a mutant to be seen, where that is rare: no other schedules are played."""

MUTANTS = [(name, mutant) for name, one in PLAYED.items() for mutant in one.mutants]

every_scenario = pytest.mark.parametrize("name", PLAYED)


@pytest.mark.slow
@every_scenario
def test_every_promise_holds_in_every_schedule_and_combinations_occur(capsys, name: str) -> None:
    scenario = PLAYED[name].scenario()
    coverage = scenario.coverage()
    failure = explore(scenario, range(SCHEDULES), coverage, jobs=len(os.sched_getaffinity(0)))
    assert failure is None, str(failure)
    with capsys.disabled():
        print(f"\n{coverage.table()}")
    cells = sum(1 for _ in coverage.cells())
    assert len(coverage.missed()) <= cells * PLAYED[name].missed_share
    assert not coverage.false_excuses()


@every_scenario
def test_a_schedule_has_at_least_eight_actors_at_once(name: str) -> None:
    scenario = PLAYED[name].scenario()
    assert all(len(scenario.schedule(seed).actors) >= 8 for seed in range(50))


@every_scenario
def test_a_seed_plays_the_same_story_every_time(name: str) -> None:
    scenario = PLAYED[name].scenario()
    for seed in range(1, 25):
        schedule = scenario.schedule(seed)
        assert played(scenario, schedule) == played(scenario, schedule)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_the_checks_catch_code_that(name: str, mutant: str, record_property) -> None:
    broken_code = PLAYED[name].mutants[mutant]
    with broken_code.played() as scenario:
        for seed in range(SCHEDULES):
            schedule = scenario.schedule(seed)
            if mutant in SHOWN_BY and SHOWN_BY[mutant] not in {it.kind for it in schedule.faults}:
                continue
            cause = broken(scenario, schedule)
            if cause:
                assert "AttributeError" not in cause, f"the mutant is out of date: {cause}"
                assert broken_code.cause in cause
                record_property("schedules", seed + 1)
                print(f"{mutant}: caught by schedule {seed}: {cause}")
                return
    pytest.fail(f"{mutant}: nobody noticed in {SCHEDULES} schedules")


@pytest.mark.parametrize(
    ("name", "mutant"),
    [("handoffs", "skips the quarantine"), ("control", "admits without a look at the digest")],
)
def test_a_mutant_is_shown_by_a_short_story(name: str, mutant: str) -> None:
    with PLAYED[name].mutants[mutant].played() as scenario:
        failure = explore(scenario, range(SCHEDULES))
    assert failure is not None
    assert 1 <= len(failure.schedule.actors) <= 3
    assert 1 <= len(failure.schedule.faults) <= 3
    assert str(failure.found.seed) in str(failure)
