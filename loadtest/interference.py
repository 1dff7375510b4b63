"""What a long prompt does to streams that are being written, and what keeping the two apart buys.

Eight streams decode while a 512-token prompt arrives at fixed times, whether the last one has
been answered or not. Measured in one run on the real model: the gap between two tokens of a
stream, tokens per second, and the arriving prompts' time to first token, for one process with
whole and with chunked prefill and for a prefill and a decode worker on a core each, beside that
decode worker without any arrivals. Start with `PLACEMENTS`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from loadtest.bench.baton import BATON, is_ready
from loadtest.bench.client import LoadFailed
from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import (
    NotStarted,
    free_port,
    running,
    unwind_when_told_to_stop,
    wait_until,
)
from loadtest.sse import Events

START_SECONDS = 180.0
WARM_TOKENS = 16
WANTED_RATIO = 1.5
CHUNK_TOKENS = 64
TOPICS = ("a lighthouse", "the sea", "a railway", "honey", "chess", "winter", "a market", "bridges")
FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN = 1000, 40000
"""Ids of the bundled model that stand for ordinary text, from which prompts are drawn."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of each placement."""

    streams: int
    prompt_tokens: int
    answer_tokens: int
    every_seconds: float
    window_seconds: float
    seed: int


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One way to use two cores. `arrivals`: whether prompts arrive."""

    name: str
    workers: dict[str, dict[str, Any]]
    arrivals: bool = True


def _apart(cores: Sequence[int]) -> dict[str, dict[str, Any]]:
    """A prefill and a decode worker on a core each, with the layouts of the defaults."""
    return {
        "prefill": {
            "role": "prefill",
            "threads": 1,
            "cpus": [cores[0]],
            "step_tokens": 2048,
            "options": {
                "block_tokens": 32,
                "axes": "layer kv block token head dim",
                "pool_tokens": 16384,
            },
        },
        "decode": {
            "role": "decode",
            "threads": 1,
            "cpus": [cores[1]],
            "options": {"block_tokens": 16, "pool_tokens": 32768},
        },
    }


def _together(cores: Sequence[int], step_tokens: int) -> dict[str, dict[str, Any]]:
    """One worker that does both with a thread on each core."""
    return {
        "both": {
            "role": "both",
            "threads": 2,
            "cpus": list(cores[:2]),
            "step_tokens": step_tokens,
            "options": {"block_tokens": 16, "pool_tokens": 32768},
        }
    }


def placements(cores: Sequence[int], load: Load) -> list[Placement]:
    """All that are compared; the first is what the others are compared with."""
    return [
        Placement(name="decode alone, one core", workers=_apart(cores), arrivals=False),
        Placement(
            name="one process, whole prefill",
            workers=_together(cores, load.prompt_tokens + load.streams),
        ),
        Placement(
            name=f"one process, chunks of {CHUNK_TOKENS}",
            workers=_together(cores, CHUNK_TOKENS + load.streams),
        ),
        Placement(name="prefill and decode apart", workers=_apart(cores)),
    ]


class Outcome(msgspec.Struct, kw_only=True):
    """What one placement gave, in seconds."""

    gaps: list[float] = []
    tokens: int = 0
    seconds: float = 0.0
    first_tokens: list[float] = []

    @property
    def rate(self) -> float:
        """Tokens per second of all decoding streams together."""
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float]:
        """What is printed and written down."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        gaps = {f"gap_{n}_ms": 1e3 * percentile(self.gaps, s) for n, s in shares.items()}
        first = (
            {"ttft_p50_ms": 1e3 * percentile(self.first_tokens, 0.5)} if self.first_tokens else {}
        )
        return {**gaps, "tokens_per_second": self.rate, **first}


class Observer:
    """Drives one running Baton and notes when tokens arrive."""

    def __init__(self, session: aiohttp.ClientSession, load: Load) -> None:
        self._session = session
        self._load = load
        self._rng = random.Random(load.seed)
        self._counts = [0] * load.streams
        self._warm = asyncio.Event()
        self._watching = False
        self.outcome = Outcome()

    async def run(self, arrivals: bool) -> Outcome:
        """Start the streams, wait until all run, watch them for the window.

        Raises:
            LoadFailed: inside a group, when a request failed or a stream ended too soon.
        """
        async with asyncio.timeout(START_SECONDS + 4 * self._load.window_seconds):
            async with asyncio.TaskGroup() as tasks:
                streams = [tasks.create_task(self._decode(i)) for i in range(self._load.streams)]
                await self._warm.wait()
                if arrivals:
                    await self._arrive()  # the first one finds everything cold
                    self.outcome.first_tokens.clear()
                await self._watch(arrivals)
                for stream in streams:
                    stream.cancel()
        return self.outcome

    async def _watch(self, arrivals: bool) -> None:
        """Let the window pass; prompts that have arrived in it are answered under the same load."""
        loop = asyncio.get_running_loop()
        began, before = loop.time(), sum(self._counts)
        self._watching = True
        async with asyncio.TaskGroup() as tasks:
            if arrivals:
                tasks.create_task(self._arrive_again_and_again(began))
            await asyncio.sleep(self._load.window_seconds)
            self._watching = False
            self.outcome.seconds = loop.time() - began
            self.outcome.tokens = sum(self._counts) - before

    async def _arrive_again_and_again(self, began: float) -> None:
        """One prompt after the other at fixed times, however long answers take."""
        loop, load = asyncio.get_running_loop(), self._load
        async with asyncio.TaskGroup() as answers:
            for number in range(int(load.window_seconds / load.every_seconds)):
                await asyncio.sleep(began + number * load.every_seconds - loop.time())
                answers.create_task(self._arrive())

    async def _decode(self, index: int) -> None:
        """One long answer, until cancelled."""
        loop = asyncio.get_running_loop()
        topic = TOPICS[index % len(TOPICS)]
        body = {
            "messages": [{"role": "user", "content": f"Write a long story about {topic}."}],
            "max_tokens": 3000,
            "ignore_eos": True,
            "seed": self._load.seed + index,
        }
        before = 0.0
        async for tokens in self._tokens("/v1/chat/completions", body):
            now = loop.time()
            if self._watching and before:
                # Tokens that came in one event, or one read, are so many gaps of nothing.
                self.outcome.gaps += [now - before, *[0.0] * (tokens - 1)]
            before = now
            self._counts[index] += tokens
            if not self._warm.is_set() and min(self._counts) >= WARM_TOKENS:
                self._warm.set()
        if not self.outcome.seconds:
            raise LoadFailed("a stream ended before the window did")

    async def _arrive(self) -> None:
        """One prompt, and the few tokens of its answer."""
        loop, load = asyncio.get_running_loop(), self._load
        prompt = [
            self._rng.randint(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN)
            for _ in range(load.prompt_tokens)
        ]
        body = {"prompt": prompt, "max_tokens": load.answer_tokens, "ignore_eos": True}
        began, first = loop.time(), None
        async for _ in self._tokens("/v1/completions", body):
            first = first or loop.time() - began
        if first is None:
            raise LoadFailed("a prompt was answered without a token")
        self.outcome.first_tokens.append(first)

    async def _tokens(self, path: str, body: dict[str, Any]) -> Any:
        """The number of tokens in each event, as it arrives."""
        body = {**body, "model": "real", "stream": True, "return_token_ids": True}
        async with self._session.post(path, json=body) as response:
            if response.status != 200:
                raise LoadFailed(f"{path}: {response.status} {await response.text()}")
            events = Events()
            async for piece in response.content.iter_any():
                for data in events.feed(piece):
                    if data == "[DONE]":
                        return
                    count = _count(data)
                    if count:
                        yield count


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


def _count(data: str) -> int:
    event = msgspec.json.decode(data, type=_Event)
    if event.error is not None:
        raise LoadFailed(f"an answer failed: {event.error}")
    return sum(len(choice.token_ids or ()) for choice in event.choices)


@contextmanager
def serving(placement: Placement) -> Iterator[int]:
    """`baton serve` with this placement's workers; its port."""
    with tempfile.TemporaryDirectory(prefix="baton-interference-") as name:
        folder, port = Path(name), free_port()
        config, log = folder / "baton.json", folder / "baton.log"
        told = {
            "data_dir": str(folder / "data"),
            "model": {"name": "real"},
            "gateway": {"port": port},
            "workers": placement.workers,
        }
        config.write_text(json.dumps(told))
        with running([*BATON, "serve", "--config", str(config)], log) as process:
            wait_until(lambda: is_ready(port), process, log, START_SECONDS)
            yield port


async def observe(port: int, load: Load, arrivals: bool) -> Outcome:
    """Load a running Baton."""
    unlimited = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=unlimited) as session:
        return await Observer(session, load).run(arrivals)


HEADER = ["placement", "gap p50", "p90", "p99", "max ms", "p99 x alone", "tokens/s", "x alone",
          "TTFT p50 ms"]  # fmt: skip


def row(name: str, outcome: Outcome, alone: Outcome) -> list[str]:
    """One line of the table."""
    figures, base = outcome.figures(), alone.figures()
    gaps = [f"{figures[f'gap_{share}_ms']:.1f}" for share in ("p50", "p90", "p99", "max")]
    first = figures.get("ttft_p50_ms")
    return [
        name,
        *gaps,
        f"{figures['gap_p99_ms'] / base['gap_p99_ms']:.2f}",
        f"{outcome.rate:.0f}",
        f"{outcome.rate / alone.rate:.2f}",
        f"{first:.0f}" if first is not None else "-",
    ]


LOWER_IS_BETTER = {
    "gap_p50_ms": "median gap",
    "gap_p99_ms": "99th percentile of the gap",
    "ttft_p50_ms": "time to first token",
}


def comparison(outcomes: dict[str, Outcome]) -> Iterator[str]:
    """In words: whether the aim is met, and where keeping the phases apart wins and loses."""
    names = list(outcomes)
    alone, apart = outcomes[names[0]].figures(), outcomes[names[-1]].figures()
    ratio = apart["gap_p99_ms"] / alone["gap_p99_ms"]
    met = "met" if ratio <= WANTED_RATIO else "MISSED"
    yield f"{met}: p99 of the gap apart is {ratio:.2f} of decode alone, aim {WANTED_RATIO}"
    for name in names[1:-1]:
        other = outcomes[name].figures()
        ratios = {label: other[key] / apart[key] for key, label in LOWER_IS_BETTER.items()} | {
            "tokens/s": apart["tokens_per_second"] / other["tokens_per_second"]
        }
        wins = [f"{label} ({r:.2f}x)" for label, r in ratios.items() if r > 1]
        losses = [f"{label} ({1 / r:.2f}x)" for label, r in ratios.items() if r <= 1]
        yield f"against {name}: better in {', '.join(wins) or 'nothing'}"
        yield f"{' ' * len(f'against {name}')}  worse in {', '.join(losses) or 'nothing'}"


def run(load: Load, cores: Sequence[int]) -> int:
    """Measure every placement and print the table; the exit code."""
    results = Results("interference", msgspec.to_builtins(load), ROOT / "bench-results")
    outcomes: dict[str, Outcome] = {}
    for number, placement in enumerate(placements(cores, load)):
        print(f"{number + 1}/4 {placement.name} ...", file=sys.stderr, flush=True)
        try:
            with serving(placement) as port:
                outcome = uvloop.run(observe(port, load, placement.arrivals))
        except (NotStarted, OSError, aiohttp.ClientError) as error:
            print(f"{placement.name}: {error}")
            return 1
        except ExceptionGroup as group:
            print(f"{placement.name}: {group.exceptions[0]}")
            return 1
        outcomes[placement.name] = outcome
        results.add({"placement": placement.name, **outcome.figures(), "gaps": len(outcome.gaps)})
    alone = next(iter(outcomes.values()))
    print(
        f"\n{load.streams} streams decode while a prompt of {load.prompt_tokens} tokens arrives"
        f" every {load.every_seconds:g} s; {load.window_seconds:g} s each\n"
    )
    print(table(HEADER, [row(name, outcome, alone) for name, outcome in outcomes.items()]))
    print("\n" + "\n".join(comparison(outcomes)) + f"\n{results.path}")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8, help="answers being written")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of an arriving prompt")
    parser.add_argument("--answer-tokens", type=int, default=4, help="of its answer")
    parser.add_argument("--every", type=float, default=1.5, help="seconds between arrivals")
    parser.add_argument("--window", type=float, default=21.0, help="seconds per placement")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("this comparison needs two cores; there is one")
        return 1
    load = Load(
        streams=asked.streams,
        prompt_tokens=asked.prompt_tokens,
        answer_tokens=asked.answer_tokens,
        every_seconds=asked.every,
        window_seconds=asked.window,
        seed=asked.seed,
    )
    unwind_when_told_to_stop()
    warn_if_busy()
    return run(load, cores)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
