"""What the queue costs a request that does not have to wait, beside a gateway without it.

Two gateways with the same workers and the same Redis, of which one lets everybody in without
asking, take turns on one core; everything else has another. Figures are differences: of the time
to the first token (open loop), and of the gateway's CPU time per request, at that rate and
saturated. Start with `main`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import uvloop

from loadtest.bench.baton import BATON, MODEL, START_SECONDS, configuration, is_ready, start_redis
from loadtest.bench.client import short_requests
from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import (
    free_port,
    raise_file_limit,
    running,
    unwind_when_told_to_stop,
    wait_until,
)
from loadtest.bench.servers import Cores
from loadtest.bench.timed import OpenLoop
from loadtest.bench.wire import post
from loadtest.bench_gateway import WORDS, choose_cores

WITH, WITHOUT = "with the queue", "without"
MOST_MILLISECONDS, MOST_MICROSECONDS = 1.0, 150.0
STEP_SECONDS = 0.002


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is run. Slices take turns, so that a noisy second hits both sides alike."""

    slices: int
    slice_seconds: float
    per_second: float
    connections: int
    saturated_seconds: float
    tokens: int
    prompt_words: int
    seed: int


class Figures(msgspec.Struct):
    """What one side gave, by slice: seconds to the first token, and CPU seconds of how many."""

    times: list[list[float]] = []
    paced: list[tuple[float, int]] = []
    saturated: list[tuple[float, int]] = []

    def milliseconds(self, share: float) -> list[float]:
        """A percentile of the time to the first token in each slice."""
        return [percentile(times, share) * 1e3 for times in self.times]

    @property
    def columns(self) -> list[list[float]]:
        """The columns of the table, each by slice."""
        half, most = self.milliseconds(0.5), self.milliseconds(0.99)
        return [half, most, microseconds(self.paced), microseconds(self.saturated)]


def microseconds(slices: list[tuple[float, int]]) -> list[float]:
    """CPU time per request in each slice."""
    return [cpu / count * 1e6 for cpu, count in slices]


def running_seconds(pid: int) -> float:
    """CPU time of a process that keeps its threads, finer than by clock ticks."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class Side(msgspec.Struct, frozen=True):
    """A gateway under test."""

    port: int
    pid: int


@contextmanager
def sides(folder: Path, cores: Cores) -> Iterator[dict[str, Side]]:
    """Both gateways, ready, with one Redis and one pair of workers that compute nothing."""
    with ExitStack() as stack:
        start_redis(stack, folder, cores)
        told = configuration(folder, free_port())
        words = [f"--redis={told['redis']['url']}", f"--deployment={told['deployment']}"]
        words += [f"--listen={folder}", f"--model={MODEL}", f"--interval={STEP_SECONDS}"]
        workers = [sys.executable, "-m", "loadtest.bench.worker", *words, "--cast=pair"]
        stack.enter_context(running(workers, folder / "workers.log", cores=cores.rest))
        yield {
            WITH: _gateway(stack, folder, cores, told),
            WITHOUT: _queueless(stack, folder, cores, told),
        }


def _gateway(
    stack: ExitStack, folder: Path, cores: Cores, told: dict[str, dict[str, object]]
) -> Side:
    config, log = folder / "baton.json", folder / "gateway.log"
    config.write_text(json.dumps(told))
    process = running([*BATON, "gateway", "--config", str(config)], log, cores=cores.server)
    gateway = stack.enter_context(process)
    port = int(str(told["gateway"]["port"]))
    wait_until(lambda: is_ready(port), gateway, log, START_SECONDS)
    return Side(port, gateway.pid)


def _queueless(
    stack: ExitStack, folder: Path, cores: Cores, told: dict[str, dict[str, object]]
) -> Side:
    config, log, port = folder / "queueless.json", folder / "queueless.log", free_port()
    flags = {"deployment": told["deployment"], "data_dir": told["data_dir"]}
    flags |= {"redis.url": told["redis"]["url"], "gateway.port": port, "model.name": MODEL}
    config.write_text(json.dumps(flags))
    words = [sys.executable, "-m", "loadtest.bench.queueless", str(config)]
    gateway = stack.enter_context(running(words, log, cores=cores.server))
    wait_until(lambda: is_ready(port), gateway, log, START_SECONDS)
    return Side(port, gateway.pid)


def requests_of(plan: Plan, *, stream: bool) -> list[bytes]:
    """As many different requests as one slice sends."""
    rng = random.Random(plan.seed)
    made = []
    for _ in range(max(plan.connections, int(plan.per_second * plan.slice_seconds))):
        content = " ".join(rng.choices(WORDS, k=plan.prompt_words))
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": plan.tokens,
            "ignore_eos": True,
            "stream": stream,
        }
        made.append(post("127.0.0.1", "/v1/chat/completions", msgspec.json.encode(body)))
    return made


async def measure(plan: Plan, found: dict[str, Side]) -> dict[str, Figures]:
    """Let both sides take turns."""
    figures = {name: Figures() for name in found}
    streams, whole = requests_of(plan, stream=True), requests_of(plan, stream=False)
    for number in range(plan.slices + 1):
        for name in sorted(found, reverse=bool(number % 2)):
            await _slice(plan, found[name], figures[name], streams, whole, warm=number == 0)
    return figures


async def _slice(
    plan: Plan,
    side: Side,
    figures: Figures,
    streams: list[bytes],
    whole: list[bytes],
    *,
    warm: bool,
) -> None:
    """One turn of one side; the first one only warms it up."""
    loop = OpenLoop(side.port)
    try:
        before = running_seconds(side.pid)
        await loop.run(streams, plan.per_second)
        paced = (running_seconds(side.pid) - before, len(streams))
    finally:
        loop.close()
    window = await short_requests(
        side.port,
        whole,
        connections=plan.connections,
        window_seconds=plan.saturated_seconds,
        warm_seconds=0.2,
        watched={"server": [side.pid]},
    )
    if not warm:
        figures.times.append(loop.times)
        figures.paced.append(paced)
        figures.saturated.append((window.cpu["server"], window.count))


def report(plan: Plan, figures: dict[str, Figures]) -> str:
    """The table, and whether the aims are met."""
    mine, other = figures[WITH].columns, figures[WITHOUT].columns
    # Slices that ran one after the other are compared, and not whole runs.
    apart = [[x - y for x, y in zip(*both, strict=True)] for both in zip(mine, other, strict=True)]
    table_of = {WITH: mine, WITHOUT: other, "added": apart}
    medians = {name: [statistics.median(one) for one in four] for name, four in table_of.items()}
    rows = [
        [name, *(f"{one:.2f}" for one in four[:2]), *(f"{one:.0f}" for one in four[2:])]
        for name, four in medians.items()
    ]
    added = medians["added"]
    rate = f"{plan.per_second:g}/s"
    header = ["gateway", "TTFT p50 ms", "p99 ms", f"CPU us/request at {rate}", "saturated"]
    time, cost = added[0], max(added[2:])
    return "\n".join(
        (
            table(header, rows),
            f"{_met(time <= MOST_MILLISECONDS)}: at most {MOST_MILLISECONDS:g} ms p50",
            f"{_met(cost <= MOST_MICROSECONDS)}: at most {MOST_MICROSECONDS:g} us of CPU",
        )
    )


def _met(kept: bool) -> str:
    return "met" if kept else "MISSED"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=7, help="turns of each side")
    parser.add_argument("--slice-seconds", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--saturated-seconds", type=float, default=1.5)
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    plan = Plan(
        slices=asked.slices,
        slice_seconds=asked.slice_seconds,
        per_second=asked.rate,
        connections=asked.connections,
        saturated_seconds=asked.saturated_seconds,
        tokens=asked.tokens,
        prompt_words=asked.prompt_words,
        seed=asked.seed,
    )
    unwind_when_told_to_stop()
    warn_if_busy()
    raise_file_limit(4096)
    results = Results("queue", msgspec.to_builtins(plan), ROOT / "bench-results")
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as folder,
        sides(Path(folder), choose_cores()) as found,
    ):
        figures = uvloop.run(measure(plan, found))
    for name, one in figures.items():
        results.add({"side": name, **msgspec.to_builtins(one)})
    print(f"{report(plan, figures)}\n{results.path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
