"""Print, for each shape of traffic and each load, the part of requests that met their targets."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from tests.bench.placement.hardware import Device
from tests.bench.placement.orders import Fair, Sorted
from tests.bench.placement.shapes import SHAPES, Shape
from tests.bench.placement.site import Fleet, Policy, Site, batch

LOADS = (0.5, 0.7, 0.9, 1.0, 1.2, 1.5)
THRESHOLDS = (2_000, 4_000, 8_000, 16_000, 32_000, 64_000)


def fleet_for(shape: Shape) -> Fleet:
    prefills, decodes = 4, 2
    prompt, answer = shape.means()
    workers = []
    for i in range(prefills):
        workers.append((f"p{i}", "prefill", Device(speed=1.0 if i % 2 == 0 else 0.7)))
    for i in range(decodes):
        device = Device(speed=1.0 if i % 2 == 0 else 0.8)
        workers.append((f"d{i}", "decode", replace(device, max_batch=batch(device, prompt + answer / 2))))
    return Fleet(tuple(workers))


def fcfs(): return Sorted(lambda it: it.arrived)
def edf(): return Sorted(lambda it: it.due)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--requests", type=int, default=3000)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--shape", type=int)
    p.add_argument("--loads", default=",".join(map(str, LOADS)))
    args = p.parse_args()
    loads = [float(x) for x in args.loads.split(",")]
    for shape in SHAPES if args.shape is None else [SHAPES[args.shape]]:
        fleet = fleet_for(shape)
        cap = fleet.capacity(shape, random.Random(0))
        print(shape.name, "capacity", round(cap, 2), [ (n, d.max_batch) for n,_,d in fleet.workers])
        pols = [Policy("fcfs", fcfs), Policy("edf", edf)]
        pols += [Policy(f"busy {t}", fcfs, most_tokens=t) for t in THRESHOLDS]
        for w in (0, 2, 5, 20):
            pols.append(Policy(f"baton w={w}", lambda w=w: Fair(lambda it: it.due + w * it.needs), targets=True))
        for pol in pols:
            row = []
            t = time.time()
            for load in loads:
                got = tot = tok = tt= 0
                why = {}
                for seed in range(args.seeds):
                    rs = Site(fleet, shape, pol, cap * load, args.requests, seed).run()
                    got += sum(r.in_time for r in rs); tot += len(rs)
                    tok += sum(r.prompt for r in rs if r.in_time); tt += sum(r.prompt for r in rs)
                    for r in rs:
                        k = r.refused or ("ok" if r.in_time else "lateft" if r.first > r.due else "gap")
                        why[k] = why.get(k, 0) + 1
                row.append(f"{got/tot:.3f}/{tok/tt:.2f}")
            print(f"{pol.name:14s}", *row, f"{time.time()-t:.1f}s", {k: round(v/tot,3) for k,v in why.items()}, flush=True)
if __name__ == "__main__":
    main()
