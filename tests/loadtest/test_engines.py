"""The load of two engines: its figures, and workers that a configuration takes."""

import json
from pathlib import Path

import pytest

from gateway.settings import load
from loadtest.engines import CASES, Heard, figures, rows, workers


@pytest.mark.parametrize("pair", CASES.values(), ids=CASES)
def test_its_workers_are_a_configuration(pair: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "baton.json"
    path.write_text(json.dumps({"workers": workers(*pair)}))
    made = load(path, environ={}).workers
    assert (made["prefill"].backend, made["decode"].backend) == pair
    assert made["decode"].unlike_weights is (pair[0] != pair[1])


def test_figures_are_of_all_answers() -> None:
    one, two = Heard([1.0, 1.1, 1.3]), Heard([3.0, 3.1, 3.2])
    found = figures("torch alone", 2, [one, two])
    assert found.first_ms == pytest.approx(1000)
    assert found.gap_p50_ms == pytest.approx(100)
    assert found.gap_p99_ms == pytest.approx(200)
    assert found.tokens_per_second == pytest.approx(10)
    faster = figures("another", 2, [Heard([1.0, 1.05, 1.1])])
    assert [line[-1] for line in rows([faster, found])] == ["2.00", "1.00"]
