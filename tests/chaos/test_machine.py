"""The machine itself: its clock, its dice, its way of making a failure short."""

import asyncio

import msgspec
import pytest

from tests.chaos.clock import Stuck, play
from tests.chaos.coverage import Coverage, Excuse
from tests.chaos.machine import Faults
from tests.chaos.schedule import Approach, Dice, Fault, Schedule, draw, shrink

MENU = {"here": ("fire", "flood"), "there": ("fire",)}


def test_an_hour_passes_at_once() -> None:
    async def wait() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert play(wait()) == 3600


def test_timers_go_off_in_their_order_and_timeouts_in_time() -> None:
    seen: list[str] = []

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(2, seen.append, "second")
        loop.call_later(1, seen.append, "first")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await asyncio.Event().wait()
        seen.append("timeout")
        await asyncio.sleep(1)

    play(wait())
    assert seen == ["first", "timeout", "second"]


def test_what_waits_for_ever_is_found_at_once() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="wait"):
        play(wait())


def test_a_task_that_is_left_is_a_failure() -> None:
    async def leave() -> None:
        leave.task = asyncio.ensure_future(asyncio.sleep(1))  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="tasks left"):
        play(leave())


def test_an_error_that_nobody_caught_is_a_failure() -> None:
    async def fall() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        play(fall())


def test_a_number_depends_on_the_seed_and_its_purpose_only() -> None:
    assert Dice(1)("delay", 3) == Dice(1)("delay", 3)
    others = {Dice(1)("delay", 4), Dice(2)("delay", 3), Dice(1)("pace", 3), Dice(1)("delay")}
    assert len({*others, Dice(1)("delay", 3)}) == 5
    numbers = [Dice(7)("x", n) for n in range(1000)]
    assert 0.45 < sum(numbers) / 1000 < 0.55
    assert 0 <= min(numbers) < max(numbers) < 1


def test_a_seed_always_gives_the_same_schedule() -> None:
    assert draw(5, range(8), MENU) == draw(5, range(8), MENU)
    assert len({draw(seed, range(8), MENU) for seed in range(1, 16)}) == 15
    assert not draw(32, range(8), MENU).faults


def test_an_approach_comes_before_what_it_leads_to() -> None:
    approach = Approach((("here", 2, "flood", 0.5),), (("there", 3),))
    faults = [it for seed in range(99) for it in draw(seed, (1,), MENU, [approach]).faults]
    at = faults.index(Fault(1, "here", 2, "flood", 0.5))
    assert (faults[at + 1].point, faults[at + 1].nth) == ("there", 3)


@pytest.mark.parametrize("guilty", [(3,), (3, 11), (0, 7, 19)])
def test_a_failure_shrinks_to_the_faults_and_actors_that_it_needs(guilty: tuple[int, ...]) -> None:
    faults = tuple(Fault(n % 5, "here", n, "fire", 0.1) for n in range(20))
    schedule = Schedule(1, tuple(range(6)), faults)
    needed = {faults[n] for n in guilty}
    small = shrink(schedule, lambda it: needed <= set(it.faults) and 5 in it.actors)
    assert set(small.faults) == needed
    assert set(small.actors) == {5, *(it.actor for it in needed)}


def test_each_fault_strikes_once_at_the_passage_that_it_names() -> None:
    fault = Fault(1, "here", 2, "fire", 0.5)
    coverage = Coverage(MENU, ("dry", "wet"), ())
    faults = Faults(Schedule(1, (1, 2), (fault,)), coverage)
    struck = [faults.passing(actor, "here", lambda: "wet") for actor in (1, 2, 2, 1, 1)]
    assert struck == [[], [], [], [fault], []]
    assert coverage.counts == {("here", "wet", "fire"): 1}


def test_coverage_demands_what_is_not_excused_and_sees_through_a_false_excuse() -> None:
    coverage = Coverage(MENU, ("dry", "wet"), (Excuse("never wet there", ("there",), ("wet",)),))
    coverage.note("here", "dry", "fire")
    assert set(coverage.missed()) == {
        ("here", "dry", "flood"),
        ("here", "wet", "fire"),
        ("here", "wet", "flood"),
        ("there", "dry", "fire"),
    }
    assert not coverage.false_excuses()
    coverage.note("there", "wet", "fire")
    assert coverage.false_excuses() == [("there", "wet", "fire")]
    assert "a: never wet there" in coverage.table()


def test_a_schedule_reads_as_a_short_list() -> None:
    schedule = Schedule(3, (1,), (msgspec.structs.replace(Fault(1, "here", 2, "fire", 0.5)),))
    assert str(schedule) == "schedule 3: actors 1\n  fire (0.50) at here #2 of actor 1"
