"""How long after a cancel the blocks on both sides are free, for each state that it may hit.

    python -m tests.life.cancels [--count 1000] [--seed 1]

A gateway, a prefill and a decode worker in one process, over real sockets, shared memory and
Redis, with synthetic backends whose steps take as long as a real one's: a cancel that comes
during a step is heard at its end. The time ends when no block is held any more, quarantine
included.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from gateway.life.job import Job
from gateway.life.states import State
from loadtest.bench.figures import percentile, table
from tests.control.conftest import LiveServer, programs
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster
from tests.support.patience import PATIENCE_SECONDS

STATES = (State.QUEUED, State.PLACED, State.PREFILLING, State.HANDING_OVER, State.DECODING)
PACE = {"step_seconds": 0.01, "prefill_seconds_per_token": 0.0001}
AIM_SECONDS = 1.0

Times = dict[tuple[State, str], list[float]]


async def measure(redis_url: str, count: int, seed: int) -> Times:
    """Cancel `count` requests, as many in each state; seconds until each worker was empty.

    Raises:
        TimeoutError: blocks were not freed within `PATIENCE_SECONDS`.
    """
    dice = random.Random(seed)
    found: Times = defaultdict(list)
    done: Counter[State] = Counter()
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", **PREFILL, **PACE)
        await made.start("d", "decode", **DECODE, **PACE)
        await made.paired()
        while sum(done.values()) < count:
            wanted = min(STATES, key=lambda state: done[state])
            hit, seconds = await _cancel(made, dice, wanted)
            if hit in STATES:
                done[hit] += 1
                for worker, took in seconds.items():
                    found[hit, worker].append(took)
        await made.balanced()
    return found


async def _cancel(
    made: Cluster, dice: random.Random, wanted: State
) -> tuple[State, Mapping[str, float]]:
    """Cancel one request in that state, or in a later one; the state, and the times."""
    prompt = dice.choices(range(40000), k=dice.randint(1, 700))
    job = made.job(prompt, n=dice.choice([1, 1, 2, 3]), max_tokens=200)
    carrying = asyncio.ensure_future(made.carry(job, Heard()))
    await _reach(made, job, carrying, wanted)
    if wanted in (State.PREFILLING, State.DECODING):
        await asyncio.sleep(dice.uniform(0, 0.02))  # anywhere in it, and in a step
    hit = _state(made, job) or State.DONE
    carrying.cancel()
    return hit, await _emptied(made, carrying)


async def _reach(made: Cluster, job: Job, carrying: asyncio.Future[object], wanted: State) -> None:
    while not carrying.done():
        state = _state(made, job)
        if state is not None and STATES.index(state) >= STATES.index(wanted):
            return
        await asyncio.sleep(0)


def _state(made: Cluster, job: Job) -> State | None:
    run = made.relay._runs.get(job)
    states = [life.state for life in run.lives] if run is not None else []
    return states[0] if states and states[0] in STATES else None


async def _emptied(made: Cluster, carrying: asyncio.Future[object]) -> dict[str, float]:
    """Seconds from now until each worker was empty, and stayed so."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    books = {name: host._ledger for name, host in made.hosts.items()}
    seconds: dict[str, float] = {}

    async def told() -> None:
        await asyncio.wait([carrying])
        await made.fleet.ledgers()  # the answer comes after all that the workers were sent before

    telling = asyncio.ensure_future(told())
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(seconds) < len(books) or not telling.done():
            await asyncio.sleep(0)
            for name, book in books.items():
                if book.free == book.blocks:
                    seconds.setdefault(name, loop.time() - began)
                else:
                    seconds.pop(name, None)
    return seconds


def shown(times: Times) -> str:
    """The table, in milliseconds."""
    rows = []
    for state in STATES:
        for worker, side in (("p", "prefill"), ("d", "decode")):
            took = sorted(times[state, worker])
            if took:
                figures = [percentile(took, part) * 1e3 for part in (0.5, 0.99)]
                cells = [f"{figure:.1f}" for figure in (*figures, took[-1] * 1e3)]
                rows.append([state.value, side, str(len(took)), *cells])
    return table(["cancelled while", "side", "cancels", "p50", "p99", "longest"], rows)


async def run(count: int, seed: int) -> Times:
    """Measure with a Redis of our own."""
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(next(iter(programs().values())), Path(folder))
        await server.start()
        try:
            return await measure(server.url, count, seed)
        finally:
            server.kill()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    times = asyncio.run(run(options.count, options.seed))
    print(shown(times))
    worst = max(percentile(sorted(took), 0.99) for took in times.values())
    met = "met" if worst <= AIM_SECONDS else "MISSED"
    print(f"p99 within {AIM_SECONDS} s in every state: {met}")


if __name__ == "__main__":
    main()
