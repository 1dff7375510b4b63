"""A third party's plug-in: built and installed as a wheel, found by its name, kit green."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from backends.testing import STEPPED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "third_party"


def run(*command: str, path: list[Path], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    # Threads that spin for each other take longer than one alone on a busy machine.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what its wheel installs; nothing is fetched for that."""
    folder = tmp_path_factory.mktemp("third-party")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "abacus_decode.py"):
        (copy / name).write_bytes((PACKAGE / name).read_bytes())
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    built = run(
        "pip", "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(copy), path=[]
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("abacus_decode-*.whl")
    target = folder / "site"
    done = run("pip", "install", *offline, "--target", str(target), str(wheel), path=[])
    assert done.returncode == 0, done.stderr
    return target


def test_a_plug_in_from_a_wheel_keeps_every_promise_also_behind_torch(installed, tmp_path):
    answer = tmp_path / "answer.json"
    command = ("gateway.cli", "conformance", "abacus", "--tiny-model", "--json", str(answer))
    found = run(*command, path=[installed, ROOT])
    assert found.returncode == 0, found.stdout + found.stderr
    report = msgspec.json.decode(answer.read_bytes())
    assert report["ok"] is True
    assert report["reference"].startswith("emulation ")
    assert [it["promise"] for it in report["verdicts"]] == [it.__name__ for it in STEPPED]
    assert {it["outcome"] for it in report["verdicts"]} == {"kept"}
    assert f"abacus: {len(STEPPED)} promises kept, 0 broken, 0 not proven" in found.stdout


def test_a_name_that_nobody_installed_is_refused_with_those_there_are(installed):
    found = run("gateway.cli", "conformance", "acbaus", path=[installed, ROOT])
    assert found.returncode == 2
    assert "'acbaus'; installed: abacus, emulation" in found.stderr
