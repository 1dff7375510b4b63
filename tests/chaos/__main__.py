"""Replay one schedule, or play many of them: `python -m tests.chaos --help`."""

from __future__ import annotations

import argparse
import gc
import sys
import time

import structlog

from tests.chaos.control.game import Control
from tests.chaos.handoffs.game import Handoffs
from tests.chaos.machine import Scenario, broken, shortest

SCENARIOS: tuple[type[Scenario], ...] = (Handoffs, Control)


def spare_the_collector() -> None:
    """Every game leaves cycles behind; what was there before need not be looked through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("scenario", choices=[it.name for it in SCENARIOS], help="what is played")
    parser.add_argument("--seed", type=int, help="replay this one, and shrink it if it fails")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    scenario = next(it for it in SCENARIOS if it.name == options.scenario)()
    coverage = scenario.coverage()
    seeds = range(options.first, options.first + options.count)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    spare_the_collector()
    began = time.process_time()
    for seed in seeds:
        schedule = scenario.schedule(seed)
        if broken(scenario, schedule, coverage):
            print(shortest(scenario, schedule))
            return 1
    print(coverage.table())
    for name, cells in (("missed", coverage.missed()), ("wrong", coverage.false_excuses())):
        print(f"{name}:", *(" ".join(it) for it in cells), sep="\n  ")
    took = time.process_time() - began
    print(f"{len(seeds)} schedules, {took / len(seeds) * 1e3:.1f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
