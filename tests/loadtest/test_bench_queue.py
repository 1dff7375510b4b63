"""The benchmark of the queue runs, both sides answer, and its table says what is added."""

import tempfile
from pathlib import Path

import pytest
import uvloop

from loadtest.bench.servers import Cores
from loadtest.bench_queue import WITH, WITHOUT, Figures, Plan, measure, report, sides

PLAN = Plan(
    slices=2,
    slice_seconds=0.3,
    per_second=50.0,
    connections=4,
    saturated_seconds=0.3,
    tokens=4,
    prompt_words=8,
    seed=1,
)


@pytest.mark.slow
def test_both_gateways_take_turns_and_answer_all() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="baton-test-") as folder,
        sides(Path(folder), Cores(server=None, rest=None)) as found,
    ):
        figures = uvloop.run(measure(PLAN, found))
        queued = (Path(folder) / "gateway.log").read_text()
        free = (Path(folder) / "queueless.log").read_text()
    for name in (WITH, WITHOUT):
        assert [len(times) for times in figures[name].times] == [15, 15]
        assert all(count > 0 for _, count in figures[name].saturated)
    assert '"use":"queue"' in queued
    assert '"use":"queue"' not in free
    assert "added" in report(PLAN, figures)


def test_what_is_added_is_the_median_of_neighbouring_slices() -> None:
    fast = Figures(
        times=[[0.001], [0.009], [0.001]], paced=[(0.001, 10)] * 3, saturated=[(0.001, 10)] * 3
    )
    slow = Figures(
        times=[[0.003], [0.011], [0.009]], paced=[(0.004, 10)] * 3, saturated=[(0.0005, 10)] * 3
    )
    told = report(PLAN, {WITH: slow, WITHOUT: fast})
    assert told.splitlines()[4].split()[:2] == ["added", "2.00"]
    assert "MISSED: at most 1 ms" in told
    assert "MISSED: at most 150 us" in told
