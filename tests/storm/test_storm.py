"""A short storm; `make chaos` has the long ones."""

import asyncio
import itertools
import signal
from pathlib import Path

import pytest

from tests.storm.__main__ import SYNTHETIC_TREE, play
from tests.storm.clients import Answer, Ask
from tests.storm.faults import MEMBERS, schedule
from tests.storm.play import Plan, table
from tests.storm.site import Part
from tests.storm.truth import asks, wrong
from tests.support.patience import PATIENCE_SECONDS


@pytest.mark.slow
async def test_a_short_storm_costs_no_client_a_word() -> None:
    plan = Plan(seed=16, seconds=20)  # it kills one of each kind
    outcome = await play(SYNTHETIC_TREE, asks(plan.seed, 30), plan, 16, wrong)
    print(table(outcome))
    assert not outcome.complaints, outcome.complaints
    assert outcome.count(steady=True)["whole"]
    assert outcome.count(steady=False)["whole"]


async def test_whoever_still_starts_is_spared(tmp_path: Path) -> None:
    """Also when it starts anew, after what an earlier start has logged."""
    go = tmp_path / "go"
    script = f"until [ -e {go} ]; do sleep 0.01; done; echo worker.started; exec sleep 600"
    part = Part("p1", "prefill", ["sh", "-c", script], tmp_path / "log")
    for _ in range(2):
        part.start()
        assert not await part.serves()
        go.touch()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await part.serves():
                await asyncio.sleep(0.01)
        go.unlink()
        part.send(signal.SIGKILL)
        await part.ended(PATIENCE_SECONDS)


def test_a_schedule_is_its_seeds_and_spares_redis_and_whoever_sleeps() -> None:
    faults = schedule(3, 300, 1.0)
    assert faults == schedule(3, 300, 1.0) != schedule(4, 300, 1.0)
    assert {fault.target for fault in faults} == {*MEMBERS, "redis"}
    assert {fault.kind for fault in faults} == {"kill", "stop"}
    times = [fault.at for fault in faults if fault.target == "redis"]
    assert min(later - at for at, later in itertools.pairwise(times)) >= 30
    awake = dict.fromkeys(MEMBERS, 0.0)
    for fault in faults:
        if fault.target != "redis":
            assert fault.at > awake[fault.target]
            awake[fault.target] = fault.at + fault.seconds


RIGHT = Answer(
    end="whole", tokens={0: [1, 2, 3]}, text={0: "abc"}, finish={0: "length"}, attempts=1
)


@pytest.mark.parametrize(
    ("tokens", "text", "end", "fault"),
    [
        ([1, 2, 3], "abc", "whole", ""),
        ([1, 2], "ab", "broken", ""),
        ([], "", "error", ""),
        ([1, 2], "ab", "whole", "it ended at"),
        ([1, 2, 3, 3], "abc", "broken", "is not the beginning"),
        ([1, 3], "ab", "broken", "is not the beginning"),
        ([1, 2], "ac", "broken", "is not the beginning"),
        ([1, 2, 3], "abcc", "whole", "is not the beginning"),
    ],
)
def test_a_wrong_word_is_seen(tokens: list[int], text: str, end: str, fault: str) -> None:
    answer = Answer(end=end, tokens={0: tokens}, text={0: text}, finish={0: "length"})
    ask = Ask(prompt=(1,), max_tokens=3, seed=1)
    assert fault in wrong(ask, answer, RIGHT)
    assert bool(fault) == bool(wrong(ask, answer, RIGHT))
