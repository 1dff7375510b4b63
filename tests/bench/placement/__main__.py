"""The part of requests that get their first token and their gaps in time, policy by policy.

    python -m tests.bench.placement [--requests 3000] [--seeds 2] [--folder bench-results]

In virtual time and seeded: the same command gives the same figures on any machine. Load 1 is what
keeps the busier of the two phases busy all the time.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from loadtest.bench.figures import ROOT, Results, table
from tests.bench.placement.fleet import fleet_for
from tests.bench.placement.orders import FIRST_SECONDS, FIRST_SECONDS_PER_1000, GAP_SECONDS
from tests.bench.placement.policies import BATON, BUSY, PEERS, SHARED, Policy
from tests.bench.placement.shapes import SHAPES, Shape
from tests.bench.placement.site import Site

LOADS = (0.5, 0.7, 0.9, 1.0, 1.2, 1.5)
OVERLOADS = (1.2, 1.5)
AIM = 1.1


def goodput(shape: Shape, policy: Policy, load: float, requests: int, seeds: int) -> float:
    """The part of requests, over all seeds, that kept both targets."""
    fleet = fleet_for(shape)
    rate = load * fleet.capacity(shape, random.Random(0))
    played = [
        request
        for seed in range(seeds)
        for request in Site(fleet, shape, policy, rate, requests, seed).run()
    ]
    return sum(request.in_time for request in played) / len(played)


def compare(
    pool: ProcessPoolExecutor, shape: Shape, loads: Sequence[float], requests: int, seeds: int
) -> dict[str, list[float]]:
    """Goodput of each policy at each load. Of the thresholds, the best one in overload."""
    runs = {
        policy: [pool.submit(goodput, shape, policy, load, requests, seeds) for load in loads]
        for policy in (*PEERS, *BUSY, BATON, SHARED)
    }
    found = {policy: [run.result() for run in submitted] for policy, submitted in runs.items()}
    heavy = [place for place, load in enumerate(loads) if load >= min(OVERLOADS)] or [0]
    best = max(BUSY, key=lambda policy: sum(found[policy][place] for place in heavy))
    kept = (*PEERS, best, BATON, SHARED)
    return {policy.name: found[policy] for policy in kept}


def verdict(loads: Sequence[float], found: dict[str, list[float]]) -> str:
    """Baton against the best of the others, and whether the aims are met."""
    mine = found[BATON.name]
    others = [max(values) for values in zip(*list(found.values())[:3], strict=True)]
    ratios = {load: own / other for load, own, other in zip(loads, mine, others, strict=True)}
    below = all(ratio >= 0.995 for load, ratio in ratios.items() if load < 1)
    above = all(ratio >= AIM for load, ratio in ratios.items() if load in OVERLOADS)
    shown = ", ".join(f"{load}: {ratio:.2f}" for load, ratio in ratios.items())
    met = {True: "met", False: "MISSED"}
    return (
        f"of the best of the three: {shown}\n"
        f"aims: not lower below capacity: {met[below]}; {AIM} of it in overload: {met[above]}"
    )


def main() -> int:
    """Play and print; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--shapes", default=",".join(map(str, range(len(SHAPES)))))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    loads = [float(load) for load in options.loads.split(",")]
    settings = {name: str(value) for name, value in vars(options).items()}
    results = Results("placement", settings, options.folder)
    print(
        f"targets: first token within {FIRST_SECONDS} s + {FIRST_SECONDS_PER_1000} s per 1,000"
        f" prompt tokens, mean gap within {GAP_SECONDS * 1e3:.0f} ms"
    )
    with ProcessPoolExecutor(options.processes) as pool:
        for number in map(int, options.shapes.split(",")):
            shape = SHAPES[number]
            found = compare(pool, shape, loads, options.requests, options.seeds)
            for name, values in found.items():
                results.add({"shape": shape.name, "policy": name, "goodput": values})
            rows = [[name, *(f"{it:.3f}" for it in values)] for name, values in found.items()]
            print(f"\n{shape.name}")
            print(table(["load", *map(str, loads)], rows))
            print(verdict(loads, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
