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
