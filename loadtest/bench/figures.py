"""Figures and how they are shown: percentiles, tables, and JSON lines that say where they ran."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QUIET_LOAD = 1.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all values do not exceed.

    Raises:
        ValueError: there are no values, or `share` is no share.
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies between 0 and 1, not {share}")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be: the first one flush left, the others flush right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def machine() -> dict[str, Any]:
    """What these figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def warn_if_busy() -> None:
    """Say so when others use this machine: figures are then worse than they should be."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"busy machine (load {load:.1f}): compare only what one run shows side by side")


def commit() -> str:
    """The checkout's commit, with `+` when files differ from it; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip()


class Results:
    """A file of JSON lines in `bench-results/`; the first one says where and what."""

    def __init__(self, name: str, configuration: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        at = time.strftime("%Y%m%d-%H%M%S")
        self.path = folder / f"{name}-{at}.jsonl"
        first = {"benchmark": name, "at": at, "machine": machine(), "commit": commit()}
        self.add({**first, "configuration": dict(configuration)})

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one line, now, so that an interrupted run keeps what it has."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
