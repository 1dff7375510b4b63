"""The transfer benchmark moves what it says it moves, and says so when it did not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gateway.leash import leashed
from tests.bench.transfer.aims import judge
from tests.bench.transfer.cases import LLAMA, SMOL, Case, Kind, fill, is_there

KINDS: tuple[Kind, ...] = ("equal", "in order", "regrouped", "unequal", "cast")


@pytest.mark.parametrize("kind", KINDS)
def test_the_runs_cover_the_prefix_once_on_both_sides(kind: Kind) -> None:
    case = Case(SMOL, 45, kind)
    runs = case.runs()
    pool_bytes = case.pool_bytes(case.target)
    assert runs[:, 2].sum() == case.size
    for side in (0, 1):
        seen = np.zeros(pool_bytes, bool)
        for at, length in runs[:, [side, 2]].tolist():
            assert not seen[at : at + length].any()
            seen[at : at + length] = True


def test_runs_are_as_long_as_they_get() -> None:
    case = Case(SMOL, 64, "equal")
    assert min(case.runs()[:, 2]) == 16 * 3 * 64 * 2
    assert len(Case(SMOL, 64, "in order").runs()) == 30 * 2


def test_what_did_not_arrive_is_noticed() -> None:
    case = Case(SMOL, 64, "equal")
    source = np.zeros(case.pool_bytes(case.target), np.uint8)
    target = np.zeros_like(source)
    fill(source)
    runs = case.runs()
    assert not is_there(target, runs)
    for at, to, length in runs.tolist():
        target[to : to + length] = source[at : at + length]
    assert is_there(target, runs)
    target[runs[-1, 1]] ^= 1
    assert not is_there(target, runs)


def test_aims_are_judged_against_the_fastest_that_took_part() -> None:
    speeds = {"Baton tcp": 2.0, "bare socket": 4.0, "NIXL over TCP": 0.4}
    said = judge(Case(SMOL, 8192, "equal"), "Baton tcp", speeds)
    assert "0.50 of bare socket (aim 0.8: MISSED)" in said
    assert "5.00 of NIXL over TCP (aim 4: met)" in said
    assert "polled" not in said
    speeds = {"Baton, conversion": 3.0, "numpy": 2.0, "torch": 4.0}
    said = judge(Case(LLAMA, 2048, "unequal"), "Baton, conversion", speeds)
    assert said == "0.75 of torch (aim 0.8: MISSED)"


def test_it_prints_a_table_and_keeps_the_figures(tmp_path: Path) -> None:
    who = "bare socket;memcpy;Baton tcp;Mooncake over TCP"
    command = [sys.executable, "-m", "tests.bench.transfer", "--rounds", "1"]
    command += ["--cases", "135M, 48 tokens", "--contenders", who, "--folder", str(tmp_path)]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed")
    done = subprocess.run(
        leashed(command), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Baton tcp" in done.stdout
    assert "of bare socket (aim 0.6" in done.stdout
    [written] = tmp_path.iterdir()
    lines = written.read_text().splitlines()
    assert '"machine"' in lines[0]
    assert sum('"Baton tcp"' in line for line in lines[1:]) == 1


def test_a_pair_is_measured_again_with_both_cores_busy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.transfer", "--rounds", "1"]
    command += ["--cases", "both cores busy", "--contenders", "Baton tcp"]
    command += ["--folder", str(tmp_path)]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed")
    done = subprocess.run(
        leashed(command), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kept (aim 0.5)" in done.stdout
    [written] = tmp_path.iterdir()
    assert [it["busy"] for it in map(json.loads, written.read_text().splitlines()[1:])] == [
        False,
        True,
    ]


def test_the_overhead_is_printed_beside_a_bare_socket_and_its_aim(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.overhead", "--handoffs", "3"]
    command += ["--transports", "tcp", "--folder", str(tmp_path)]
    done = subprocess.run(
        leashed(command), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 handoffs of 128 tokens, 2.95 MB, tcp" in done.stdout
    assert "beyond moving" in done.stdout
    [written] = tmp_path.iterdir()
    assert len(written.read_text().splitlines()) == 2 + 3
