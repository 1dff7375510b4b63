"""Stories of single handoffs that the fault machine tells."""

from tests.chaos.handoffs.game import Handoffs
from tests.chaos.machine import played
from tests.chaos.schedule import Fault, Schedule


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
