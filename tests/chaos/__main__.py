"""Replay one schedule, or play many of them: `python -m tests.chaos --help`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.chaos.control.game import Control
from tests.chaos.handoffs.game import Handoffs
from tests.chaos.machine import Scenario, explore, spare_us

SCENARIOS: tuple[type[Scenario], ...] = (Handoffs, Control)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("scenario", choices=[it.name for it in SCENARIOS], help="what is played")
    parser.add_argument("--seed", type=int, help="replay this one, and shrink it if it fails")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the schedules")
    options = parser.parse_args()
    scenario = next(it for it in SCENARIOS if it.name == options.scenario)()
    coverage = scenario.coverage()
    seeds = range(options.first, options.first + options.count)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    spare_us()
    began = time.monotonic()
    failure = explore(scenario, seeds, coverage, jobs=options.jobs)
    if failure is not None:
        print(failure)
        return 1
    print(coverage.table())
    for name, cells in (("missed", coverage.missed()), ("wrong", coverage.false_excuses())):
        print(f"{name}:", *(" ".join(it) for it in cells), sep="\n  ")
    took = time.monotonic() - began
    print(f"{len(seeds)} schedules in {took:.0f} s, {took / len(seeds) * 1e3:.1f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
