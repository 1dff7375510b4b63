"""The table of a request's life."""

import itertools

import pytest

from gateway.life.states import BAD_ENDS, NEXT, Impossible, Life, State


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_a_life_follows_the_table_and_nothing_else(old: State, new: State) -> None:
    life = Life(old)
    if new in NEXT[old]:
        life.become(new)
        assert life.state is new
    else:
        with pytest.raises(Impossible):
            life.become(new)
        assert life.state is old


def test_every_state_that_can_go_on_can_also_end_badly() -> None:
    ends = {state for state in State if not NEXT[state]}
    assert ends == BAD_ENDS | {State.DONE}
    assert all(NEXT[state] >= BAD_ENDS for state in State if state not in ends)


def test_every_state_is_reached_from_queued() -> None:
    reached, news = {State.QUEUED}, {State.QUEUED}
    while news:
        news = {after for state in news for after in NEXT[state]} - reached
        reached |= news
    assert reached == set(State)
