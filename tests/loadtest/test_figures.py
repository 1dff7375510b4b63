"""Percentiles, tables and result files."""

import json

import pytest

from loadtest.bench.figures import Results, percentile, table


def test_a_percentile_is_a_value_that_was_measured():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.9) == 5.0
    assert percentile(values, 0.2) == 1.0
    assert percentile(values, 0) == 1.0
    assert percentile(values, 1) == 5.0


def test_the_99th_percentile_of_a_hundred_leaves_out_the_worst():
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99.0


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
def test_nonsense_has_no_percentile(values, share):
    with pytest.raises(ValueError, match=r"values|share"):
        percentile(values, share)


def test_columns_line_up():
    lines = table(["name", "us"], [["a", "1.0"], ["longer", "10.0"]]).splitlines()
    assert lines == ["name      us", "------  ----", "a        1.0", "longer  10.0"]


def test_results_begin_with_where_they_were_measured(tmp_path):
    results = Results("gateway", {"rounds": 3}, tmp_path)
    results.add({"mode": "step"})
    first, second = map(json.loads, results.path.read_text().splitlines())
    assert first["configuration"] == {"rounds": 3}
    assert first["machine"]["cores"] >= 1
    assert {"commit", "at", "benchmark"} <= first.keys()
    assert second == {"mode": "step"}
