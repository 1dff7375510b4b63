"""Where the time of a handoff goes, on the real model, as `baton serve` runs it.

    python -m tests.bench.handoff [--prompts 128,512,2048] [--repeats 7] [--json FILE]

Requests follow each other, alone; the durations are those that Baton logs of itself for each
(`request.finished`). `exposed` is what the transfer adds after the last layer is computed,
`overlapped` what is hidden behind the computation. The reference beside it is a copy of the same
number of bytes in this process's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.site import Site, serve

SHOWN = (
    *("queue_ms", "reserve_ms", "prefill_wait_ms", "prefill_ms", "first_token_ms"),
    *("overlapped_transfer_ms", "exposed_transfer_ms", "verify_ms", "first_step_ms"),
    "unaccounted_ms",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", default="128,512,2048", help="lengths in tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the figures, as JSON lines")
    options = parser.parse_args()
    lengths = [int(part) for part in options.prompts.split(",")]
    lines: list[dict[str, Any]] = [_circumstances(options.repeats)]
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        _tell("loading the model into two workers")
        with serve(Path(folder), {}) as site:
            site.complete(_prompt(64, 0), max_tokens=4)
            lines += [_measure(site, length, options.repeats) for length in lengths]
    _tell("")
    _print(lines[1:])
    if options.json:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _measure(site: Site, length: int, repeats: int) -> dict[str, Any]:
    before = len(site.events("gateway", "request.finished"))
    for turn in range(repeats):
        _tell(f"{length} tokens, {turn + 1} of {repeats}")
        site.complete(_prompt(length, turn), max_tokens=4, ignore_eos=True)
    events = site.events("gateway", "request.finished")[before:]
    handoffs = site.events("prefill", "handoff.committed")[-repeats:]
    size = handoffs[-1]["bytes"]
    medians = {name: statistics.median(event.get(name, 0.0) for event in events) for name in SHOWN}
    return {
        "tokens": length,
        "bytes": size,
        **{name: round(value, 2) for name, value in medians.items()},
        "copy_ms": round(_copy_ms(size), 2),
    }


def _prompt(length: int, turn: int) -> list[int]:
    return random.Random(length * 1000 + turn).choices(range(1000, 40000), k=length)


def _copy_ms(size: int) -> float:
    source, target = np.ones(size, "u1"), np.zeros(size, "u1")
    times = []
    for _ in range(9):
        began = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def _print(lines: list[dict[str, Any]]) -> None:
    print("milliseconds, medians".ljust(26) + "".join(f"{line['tokens']:>8} tok" for line in lines))
    for name in (*SHOWN, "copy_ms"):
        label = name.removesuffix("_ms").replace("_", " ")
        print(label.ljust(26) + "".join(f"{line[name]:>12.2f}" for line in lines))
    print("MB handed over".ljust(26) + "".join(f"{line['bytes'] / 1e6:>12.1f}" for line in lines))


def _circumstances(repeats: int) -> dict[str, Any]:
    return {
        "program": "tests.bench.handoff",
        "machine": {"cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()},
        "configuration": {"repeats": repeats, "workers": "default"},
    }


def _tell(doing: str) -> None:
    """Say on a terminal what is being waited for."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
