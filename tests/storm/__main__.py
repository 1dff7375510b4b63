"""`python -m tests.storm [--seconds 300] [--every 1] [--seed N]`: a storm, and its table."""

from __future__ import annotations

import argparse
import asyncio
import sys

import aiohttp

from tests.storm.clients import Ordinary
from tests.storm.play import Outcome, storm, table
from tests.storm.site import site, synthetic
from tests.storm.truth import asks, learn


def main() -> int:
    """Exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between faults")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    outcome = asyncio.run(play(options.seed, options.seconds, options.every, options.streams))
    print(table(outcome))
    return 1 if outcome.complaints else 0


async def play(seed: int, seconds: float, every: float, streams: int) -> Outcome:
    """A storm over the synthetic backend."""
    members = synthetic(step_seconds=0.02, prefill_seconds_per_token=0.0001)
    tree = {
        "workers": members,
        "gateway": {"request_timeout_seconds": 60, "max_retries": 8},
        "queue": {"lease_seconds": 3},
    }
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with site(tree) as made, aiohttp.ClientSession(connector=connector) as http:
        right = await learn(Ordinary(http, made.urls), asks(seed, 60))
        clients = [Ordinary(http, made.urls) for _ in range(streams)]
        return await storm(
            made, clients, right, seed=seed, seconds=seconds, every=every, settle_seconds=30
        )


if __name__ == "__main__":
    sys.exit(main())
