"""Stories of requests that the fault machine has found."""

from tests.chaos.control.game import Control
from tests.chaos.machine import played
from tests.chaos.schedule import Schedule


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
