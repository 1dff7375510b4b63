"""Stories of requests that the fault machine has found."""

from tests.chaos.control.game import Control
from tests.chaos.machine import played
from tests.chaos.schedule import Fault, Schedule


def test_what_was_handed_to_a_worker_that_does_not_answer_is_computed_again() -> None:
    """A gateway adopts a prefill while the decode worker, which has it by now, stands still."""
    faults = (
        Fault(2, "end", 1, "stop decode", 0.4244),
        Fault(4, "compute", 1, "kill gateway", 0.5),
        Fault(4, "open", 1, "kill decode", 0.2824),
        Fault(5, "token", 4, "kill gateway", 0.5947),
        Fault(8, "compute", 1, "part data", 0.6898),
    )
    cause, story = played(Control(), Schedule(2461, (2, 4, 5, 8), faults))
    assert not cause
    assert any("request 5 ends: done" in line for line in story)


def test_what_strikes_when_all_have_their_endings_has_its_time_to_pass() -> None:
    """A lease is given back late, and a worker is stopped at that."""
    faults = (
        Fault(4, "commit", 1, "stop redis", 0.91),
        Fault(7, "Cancel", 1, "stop redis", 0.54),
        Fault(7, "leave", 1, "stop prefill", 1.0),
    )
    cause, story = played(Control(), Schedule(33917, (4, 7), faults))
    assert not cause
    last = max(index for index, line in enumerate(story) if " ends: " in line)
    assert any("p0 stands still" in line for line in story[last:])


def test_a_deadline_passes_where_one_thing_after_another_strikes_until_then() -> None:
    """Redis away three times, two gateways that stand still, a decode worker that does."""
    schedule = Control().schedule(41663)
    cause, story = played(Control(), schedule)
    assert not cause
    assert any("request 3 ends: DeadlineExceeded" in line for line in story)
