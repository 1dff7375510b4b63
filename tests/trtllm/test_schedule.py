"""What rank 0's scheduler makes of what the library tells it, without either."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from backends.tensorrt_llm.messages import Finished, Message, Step, decode_pass
from backends.tensorrt_llm.scheduling import GLOBAL_ID, Schedule

SIZE = 4
OURS, FOREIGN = GLOBAL_ID + 1, 77


class Request(msgspec.Struct):
    """The library's, as far as it is looked at."""

    request_id: int
    tokens: list[int]

    def get_tokens(self, _beam: int) -> list[int]:
        return self.tokens


class Data(msgspec.Struct):
    """`RequestData`, as far as it is looked at."""

    request_id: int
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    new_block_ids_by_layer_group: Sequence[list[int]] = ()


@pytest.fixture
def said() -> list[Message]:
    return []


@pytest.fixture
def schedule(said: list[Message]) -> Schedule:
    made = Schedule(said.append, block_tokens=SIZE, by_id=True)
    made.admit(Request(OURS, list(range(10))), 0)
    return made


def told(schedule: Schedule, *new: Any, known: Sequence[Any] = ()) -> tuple[Any, Any]:
    one = decode_pass(schedule.next_pass(new, known))
    return one.steps, one.taken


def test_whoever_gets_blocks_is_told_of_but_for_those_that_are_shared(schedule: Schedule) -> None:
    steps, taken = told(
        schedule,
        Data(OURS, [9, 8, 7], 4, 6),
        Data(FOREIGN, [5], 0, 3),
        known=[Data(FOREIGN + 1, [3], 8, 1), Data(FOREIGN + 2, [], 5, 1)],
    )
    assert steps == (Step(OURS, 0, 10, (9, 8, 7)),)
    assert taken == (8, 7, 5, 3)


def test_groups_of_layers_and_holes_in_them_are_told_of_like_blocks(schedule: Schedule) -> None:
    _, taken = told(schedule, Data(FOREIGN, [], 0, 8, [[-1, 6]]))
    assert taken == (6,)


def test_a_request_that_is_new_again_has_other_blocks(schedule: Schedule) -> None:
    """It was put back, and computed anew from its beginning."""
    assert told(schedule, Data(OURS, [1, 2], 0, 8))[0] == (Step(OURS, 0, 8, (1, 2)),)
    assert told(schedule, Data(OURS, [5, 6], 0, 8)) == ((), (5, 6))
    steps, taken = told(schedule, known=[Data(OURS, [4], 8, 2)])
    assert (steps, taken) == ((Step(OURS, 8, 10, (4,)),), (4,))


@pytest.mark.parametrize(("blocks", "pinned"), [(3, True), (0, False)])
def test_a_request_that_has_no_blocks_any_more_pins_none(
    schedule: Schedule, said: list[Message], blocks: int, pinned: bool
) -> None:
    told(schedule, Data(OURS, [1, 2, 3], 0, 10))
    assert schedule.finished(OURS, blocks) is pinned
    assert said[-1] == Finished(OURS, blocks, pinned)
