"""5,000 schedules of the whole control plane in which everything goes wrong."""

import pytest

from tests.chaos.control.game import CONCURRENT, Control
from tests.chaos.control.mutants import MUTANTS
from tests.chaos.machine import broken, explore, played
from tests.chaos.schedule import Schedule

SCHEDULES = 5000


@pytest.mark.slow
def test_every_promise_holds_in_every_schedule_and_nearly_every_combination_occurs(capsys) -> None:
    scenario = Control()
    coverage = scenario.coverage()
    failure = explore(scenario, range(SCHEDULES), coverage)
    assert failure is None, str(failure)
    with capsys.disabled():
        print(f"\n{coverage.table()}")
    assert len(coverage.missed()) <= sum(1 for _ in coverage.cells()) // 100
    assert not coverage.false_excuses()


def test_a_schedule_has_at_least_eight_requests() -> None:
    assert all(len(Control().schedule(seed).actors) >= 8 for seed in range(50))
    assert CONCURRENT == 8


def test_a_seed_plays_the_same_story_every_time() -> None:
    scenario = Control()
    for seed in range(1, 20):
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


def test_a_mutant_is_shown_by_a_short_story() -> None:
    with MUTANTS["admits without a look at the digest"].played() as scenario:
        failure = explore(scenario, range(SCHEDULES))
    assert failure is not None
    assert 1 <= len(failure.schedule.actors) <= 3
    assert 1 <= len(failure.schedule.faults) <= 3
    assert str(failure.found.seed) in str(failure)


def test_what_was_handed_to_a_worker_that_does_not_answer_is_computed_again() -> None:
    """A gateway adopts a prefill while the decode worker, which has it by now, stands still."""
    scenario = Control()
    whole = scenario.schedule(2461)
    wanted = {
        (2, "end", "stop decode"),
        (4, "compute", "kill gateway"),
        (4, "open", "kill decode"),
        (5, "token", "kill gateway"),
        (8, "compute", "part data"),
    }
    faults = tuple(it for it in whole.faults if (it.actor, it.point, it.kind) in wanted)
    cause, story = played(scenario, Schedule(2461, (2, 4, 5, 8), faults))
    assert not cause
    assert any("request 5 ends: done" in line for line in story)
