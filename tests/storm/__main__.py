"""`make chaos`: two storms over real processes, and their tables.

    python -m tests.storm [--seed 1] [--seconds 300] [--streams 64] [--only synthetic|real]

First the synthetic backend, whose text is known, with a fault each second; then the real model,
with a fault each 20 s. A reconnecting client must always get its whole answer; an ordinary one may
see an error, or a broken connection where its gateway was killed, and never a wrong word. A float
engine whose sequences are prefilled again may choose otherwise where two tokens are equally
likely, to a thousandth: that is no wrong word (see `tests.support.margin`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.storm.clients import Answer, Ask, Ordinary, Steady
from tests.storm.play import Judge, Outcome, Plan, storm, table
from tests.storm.site import site, synthetic, workers
from tests.storm.truth import NearTies, asks, confirm, learn, questions, wrong

GATEWAY = {"request_timeout_seconds": 240, "max_retries": 8}
QUEUE = {"lease_seconds": 3}
SYNTHETIC_TREE: Mapping[str, Any] = {
    "workers": synthetic(step_seconds=0.02, prefill_seconds_per_token=0.0001),
    "gateway": GATEWAY,
    "queue": QUEUE,
}
REAL_TREE: Mapping[str, Any] = {
    # In bfloat16 another batch would be reason enough for another word.
    "workers": workers(
        "emulation", {"pool_tokens": 8192, "dtype": "float32"}, threads=1, lease_seconds=5.0
    ),
    "gateway": GATEWAY,
    "queue": QUEUE,
}


def main() -> int:
    """Exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--logs", type=Path, help="a folder that keeps what the parts have logged")
    parser.add_argument("--only", choices=("synthetic", "real"))
    options = parser.parse_args()
    complaints = 0
    for kind in ("synthetic", "real"):
        if options.only in (None, kind):
            plan = Plan(seed=options.seed, seconds=options.seconds)
            outcome = asyncio.run(_play(kind, plan, options.streams, options.logs))
            print(f"\n{kind}: {table(outcome)}", flush=True)
            complaints += len(outcome.complaints)
    return 1 if complaints else 0


async def _play(kind: str, plan: Plan, streams: int, logs: Path | None) -> Outcome:
    if kind == "synthetic":
        return await play(SYNTHETIC_TREE, asks(plan.seed, 60), plan, streams, wrong, logs)
    every, streams = 20.0, streams // 4
    plan = Plan(seed=plan.seed, seconds=plan.seconds, every=every, settle_seconds=60.0)
    judge = await asyncio.to_thread(NearTies)
    return await play(REAL_TREE, questions(), plan, streams, judge, logs)


async def play(
    tree: Mapping[str, Any],
    asked: list[Ask],
    plan: Plan,
    streams: int,
    judge: Judge,
    logs: Path | None = None,
) -> Outcome:
    """Half of the clients reconnect, and half are ordinary ones."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with (
        site(dict(tree)) as made,
        aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
    ):
        right: dict[Ask, Answer] = await learn(Ordinary(http, made.urls), asked)
        if tree is SYNTHETIC_TREE:
            await asyncio.to_thread(confirm, right)
        clients = [
            (Steady if number % 2 else Ordinary)(http, made.urls) for number in range(streams)
        ]
        try:
            return await storm(made, clients, right, plan, judge)
        finally:
            made.save_logs(logs)


if __name__ == "__main__":
    sys.exit(main())
