"""Stories of requests that the fault machine has found."""

from tests.chaos.control import plot
from tests.chaos.control.game import Control
from tests.chaos.machine import Faults, played
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


def test_a_deadline_may_pass_only_where_it_was_never_calm_for_long_enough() -> None:
    schedule = Schedule(1, (0,), ())
    game = Control().game(schedule, Faults(schedule, None))
    client = game.clients[0]
    client.seconds, client.ended_at, game.calm = 25.0, 30.0, 28.0
    for since, until, calm in (
        (4.0, 5.0 + plot.QUIET_SECONDS - 0.1, False),  # it came at 5
        (4.0, 5.0 + plot.QUIET_SECONDS, True),
        (10.0, 10.0 + plot.QUIET_SECONDS, True),
    ):
        game._calms = [(0.0, 1.0), (since, until)]
        assert game._had_calm(client) is calm
    game._calms, game.calm = [], 30.0 - plot.QUIET_SECONDS
    assert game._had_calm(client)
