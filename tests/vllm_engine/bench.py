"""vLLM by itself and behind Baton: the same model, the same requests at the same times, two cores.

Four arrangements: one stock server on both cores; a stock prefill and decode server on a core
each, behind a router as vLLM's examples have one; Baton in front of the same two servers; and
Baton's own pair, vLLM prefilling on one core and decoding on the other with KV handed over by
Baton. All are stock in what they compute: the same vLLM, precision and block size. Requests arrive
at times drawn beforehand, whether earlier ones have been answered or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from gateway.cli.export import export
from loadtest.bench.baton import BATON, is_ready
from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import free_port, running, unwind_when_told_to_stop, wait_until
from loadtest.sse import Events
from tests.vllm_engine.servers import NAME, START_SECONDS, pair, server

FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN = 1000, 40000
WARM_REQUESTS = 3
SETTLE_SECONDS = 3.0
STALL_SECONDS = 600.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of each arrangement. Lengths are in tokens."""

    requests: int
    per_second: float
    shortest: int
    longest: int
    answer: int
    dtype: str
    seed: int

    def trace(self) -> list[tuple[float, list[int]]]:
        """When each request comes, and its prompt."""
        dice, at = random.Random(self.seed), 0.0
        found = []
        for _ in range(self.requests):
            found.append((at, _prompt(dice, dice.randint(self.shortest, self.longest))))
            at += dice.expovariate(self.per_second)
        return found


def _prompt(dice: random.Random, tokens: int) -> list[int]:
    return [dice.randint(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN) for _ in range(tokens)]


class Outcome(msgspec.Struct, kw_only=True):
    """What one arrangement gave, in seconds."""

    firsts: list[float] = []
    gaps: list[float] = []
    tokens: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """What is printed and written down."""
        return {
            "ttft_p50_ms": 1e3 * percentile(self.firsts, 0.5),
            "ttft_p99_ms": 1e3 * percentile(self.firsts, 0.99),
            "gap_p50_ms": 1e3 * percentile(self.gaps, 0.5),
            "gap_p99_ms": 1e3 * percentile(self.gaps, 0.99),
            "tokens_per_second": self.tokens / self.seconds,
        }


async def play(address: str, load: Load) -> Outcome:
    """Send the trace to `address`, after a few requests that nobody counts."""
    limits = aiohttp.ClientTimeout(total=None, sock_read=STALL_SECONDS)
    async with aiohttp.ClientSession(address, timeout=limits) as session:
        dice = random.Random(load.seed + 1)
        for _ in range(WARM_REQUESTS):
            await _ask(session, _prompt(dice, load.longest), load, Outcome())
        await asyncio.sleep(SETTLE_SECONDS)
        outcome, began = Outcome(), time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for at, prompt in load.trace():
                await asyncio.sleep(began + at - time.monotonic())
                tasks.create_task(_ask(session, prompt, load, outcome))
        outcome.seconds = time.monotonic() - began
        return outcome


async def _ask(
    session: aiohttp.ClientSession, prompt: list[int], load: Load, outcome: Outcome
) -> None:
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": load.answer,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    began, before, tokens = time.monotonic(), 0.0, 0
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        events = Events()
        async for piece in response.content.iter_any():
            for data in events.feed(piece):
                count = 0 if data == "[DONE]" else _count(data)
                now = time.monotonic()
                if count and before:
                    # Tokens that came in one event, or one read, are so many gaps of nothing.
                    outcome.gaps += [now - before, *[0.0] * (count - 1)]
                elif count:
                    outcome.firsts.append(now - began)
                before = now if count else before
                tokens += count
    if tokens != load.answer:
        raise RuntimeError(f"{tokens} tokens were answered, not {load.answer}")
    outcome.tokens += tokens


def _count(data: str) -> int:
    event = json.loads(data)
    if event.get("error"):
        raise RuntimeError(str(event["error"]))
    return sum(len(choice.get("token_ids") or ()) for choice in event["choices"])


@contextmanager
def routed(folder: Path, prefill: str, decode: str) -> Iterator[str]:
    """The router in front of a pair of servers."""
    port, log = free_port(), folder / "router.log"
    words = [sys.executable, "-m", "tests.vllm_engine.router", str(port), prefill, decode]
    with running(words, log) as process:
        wait_until(lambda: is_ready(port), process, log, START_SECONDS)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def baton(folder: Path, model: Path, workers: dict[str, Any]) -> Iterator[str]:
    """`baton serve` with these workers."""
    port = free_port()
    home = Path(tempfile.mkdtemp(dir=folder))
    told = {
        "data_dir": str(home / "data"),
        "model": {"name": NAME, "source": str(model)},
        "gateway": {"port": port},
        "workers": workers,
    }
    config, log = home / "baton.json", home / "baton.log"
    config.write_text(json.dumps(told))
    with running([*BATON, "serve", "--config", str(config)], log) as process:
        wait_until(lambda: is_ready(port), process, log, START_SECONDS)
        yield f"http://127.0.0.1:{port}"


def arrangements(folder: Path, model: Path, load: Load) -> Iterator[tuple[str, str]]:
    """Each arrangement's name and address, ready; the next one when the last is done with."""
    one, other = sorted(os.sched_getaffinity(0))[:2]
    apart = (frozenset({one}), frozenset({other}))
    with server(
        model, folder, cores=frozenset({one, other}), dtype=load.dtype, hands_over=False
    ) as alone:
        yield "vLLM, one server", alone
    with pair(model, folder, cores=apart, dtype=load.dtype) as (prefill, decode):
        with routed(folder, prefill, decode) as router:
            yield "vLLM, a pair and a router", router
        fleet = {
            "prefill": prefill,
            "decode": decode,
            "model": str(model),
            "silence_seconds": STALL_SECONDS,
        }
        workers = {"fleet": {"role": "both", "backend": "vllm-served", "options": fleet}}
        with baton(folder, model, workers) as front:
            yield "Baton before that pair", front
    options = {"dtype": load.dtype, "context_tokens": 1000, "threads": 1, "pool_tokens": 8192}
    own = {
        role: {"role": role, "backend": "vllm", "threads": 1, "cpus": [core], "options": options}
        for role, core in (("prefill", one), ("decode", other))
    }
    with baton(folder, model, own) as front:
        yield "Baton's pair of vLLMs", front


HEADER = ["arrangement", "TTFT p50", "p99 ms", "gap p50", "p99 ms", "tokens/s", "x one server"]


def run(load: Load) -> int:
    """Measure every arrangement and print the table; the exit code."""
    results = Results("vllm", msgspec.to_builtins(load), ROOT / "bench-results")
    rows, base = [], 0.0
    with tempfile.TemporaryDirectory(prefix="baton-vllm-") as name:
        folder, model = Path(name), Path(name) / "model"
        export("bundled", model)
        for title, address in arrangements(folder, model, load):
            print(f"measuring: {title}", file=sys.stderr, flush=True)
            figures = asyncio.run(play(address, load)).figures()
            print(f"measured: {title}", file=sys.stderr, flush=True)
            results.add({"arrangement": title, **figures})
            rate = figures["tokens_per_second"]
            base = base or rate
            cells = [f"{it:.0f}" if it >= 100 else f"{it:.1f}" for it in figures.values()]
            rows.append([title, *cells, f"{rate / base:.2f}"])
    print(
        f"\n{load.requests} requests, {load.per_second:g} a second, prompts of {load.shortest} to"
        f" {load.longest} tokens, answers of {load.answer}, {load.dtype}, two cores\n"
    )
    print(table(HEADER, rows) + f"\n\n{results.path}")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--per-second", type=float, default=1.0)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=448)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        print("this comparison needs two cores; there is one")
        return 1
    unwind_when_told_to_stop()
    warn_if_busy()
    return run(Load(**vars(asked)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
