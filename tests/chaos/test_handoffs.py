"""5,000 schedules of handoffs in which everything goes wrong, and nothing may come of it."""

import pytest

from tests.chaos.handoffs.game import CONCURRENT, Handoffs
from tests.chaos.handoffs.mutants import MUTANTS
from tests.chaos.machine import broken, explore, played
from tests.chaos.schedule import Fault, Schedule

SCHEDULES = 5000


@pytest.mark.slow
def test_every_promise_holds_in_every_schedule_and_every_combination_occurs(capsys) -> None:
    scenario = Handoffs()
    coverage = scenario.coverage()
    failure = explore(scenario, range(SCHEDULES), coverage)
    assert failure is None, str(failure)
    with capsys.disabled():
        print(f"\n{coverage.table()}")
    assert not coverage.missed()
    assert not coverage.false_excuses()


def test_a_schedule_has_at_least_eight_handoffs_at_once() -> None:
    assert all(len(Handoffs().schedule(seed).actors) >= 8 for seed in range(50))
    assert CONCURRENT == 8


def test_a_seed_plays_the_same_story_every_time() -> None:
    scenario = Handoffs()
    for seed in range(1, 30):
        schedule = scenario.schedule(seed)
        assert played(scenario, schedule) == played(scenario, schedule)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_catch_code_that(name: str, record_property) -> None:
    with MUTANTS[name].played() as scenario:
        for seed in range(SCHEDULES):
            cause = broken(scenario, scenario.schedule(seed))
            if cause:
                assert "AttributeError" not in cause, f"the mutant is out of date: {cause}"
                assert MUTANTS[name].cause in cause
                record_property("schedules", seed + 1)
                print(f"{name}: caught by schedule {seed}: {cause}")
                return
    pytest.fail(f"{name}: nobody noticed in {SCHEDULES} schedules")


def test_a_stalled_sender_keeps_its_landing_in_quarantine_until_it_is_dead() -> None:
    scenario = Handoffs()
    struck = [Fault(1, "flight", 1, "stall", 0.9), Fault(1, "flight", 1, "cancel", 0.01)]
    cause, story = played(scenario, Schedule(1, (1,), tuple(struck)))
    assert not cause
    gone = next(n for n, line in enumerate(story) if "received: cancelled" in line)
    dead = next(n for n, line in enumerate(story) if line.endswith(" dies"))
    quiet = next(n for n, line in enumerate(story) if "quiet" in line)
    assert gone < dead < quiet


def test_rivals_are_quicker_or_not_and_some_worker_is_shunned() -> None:
    """What is checked of them is worth nothing unless it happens."""
    scenario = Handoffs()
    stories = ["\n".join(played(scenario, scenario.schedule(seed))[1]) for seed in range(100)]
    assert any("was quicker" in it for it in stories)
    assert any("rival at" in it and "was quicker" not in it for it in stories)
    assert any("shuns p" in it and "shuns nobody any more" in it for it in stories)


def test_a_mutant_is_shown_by_a_short_story() -> None:
    with MUTANTS["skips the quarantine"].played() as scenario:
        failure = explore(scenario, range(SCHEDULES))
    assert failure is not None
    assert 1 <= len(failure.schedule.actors) <= 2
    assert 1 <= len(failure.schedule.faults) <= 3
    assert str(failure.found.seed) in str(failure)
