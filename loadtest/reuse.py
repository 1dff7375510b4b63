"""What a prompt gains whose beginning was there already, and what keeping it costs the others.

Prompts of a long, shared beginning and a short end, one after the other, on the real model with a
prefill and a decode worker on a core each: asked for the first time, and again with another end.
Beside it the first time on workers that keep nothing, on the same cores; all take turns. Start with
`CASES`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from typing import Any

import aiohttp
import msgspec
import uvloop

from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import NotStarted, unwind_when_told_to_stop
from loadtest.interference import (
    FIRST_PLAIN_TOKEN,
    LAST_PLAIN_TOKEN,
    Load,
    Placement,
    placements,
    serving,
)
from loadtest.sse import Events

OFF, COLD, AGAIN = "first time, nothing is kept", "first time", "again, with another end"
CASES = (OFF, COLD, AGAIN)
POOL_TOKENS = 16384


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked."""

    shared_tokens: int
    end_tokens: int
    rounds: int
    dtype: str
    seed: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first token and from there to the second; prompt tokens not computed."""

    case: str
    first: float
    gap: float
    cached: int


class Client:
    """Asks one prompt at a time; `sites` says where each case is asked."""

    def __init__(self, sites: dict[str, aiohttp.ClientSession], shape: Shape) -> None:
        self._sites = sites
        self._shape = shape
        self._rng = random.Random(shape.seed)

    async def rounds(self) -> list[Answer]:
        """Every case once a round; the first round, which finds everything cold, is left out."""
        answers = []
        for number in range(self._shape.rounds + 1):
            shared = self._tokens(self._shape.shared_tokens)
            for case in CASES:
                answer = await self._ask(case, [*shared, *self._tokens(self._shape.end_tokens)])
                if number:
                    answers.append(answer)
                await asyncio.sleep(0.1)  # what is kept has been looked at by then
        return answers

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randint(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN) for _ in range(count)]

    async def _ask(self, case: str, prompt: list[int]) -> Answer:
        loop = asyncio.get_running_loop()
        body = {
            "model": "real",
            "prompt": prompt,
            "max_tokens": 4,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        began, times, cached = loop.time(), list[float](), 0
        async with self._sites[case].post("/v1/completions", json=body) as response:
            response.raise_for_status()
            events = Events()
            async for piece in response.content.iter_any():
                for data in events.feed(piece):
                    told: Any = {} if data == "[DONE]" else msgspec.json.decode(data)
                    if any(choice.get("token_ids") for choice in told.get("choices", ())):
                        times.append(loop.time())
                    if told.get("usage"):
                        cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        return Answer(case=case, first=times[0] - began, gap=times[1] - times[0], cached=cached)


async def _measure(off: int, on: int, shape: Shape) -> list[Answer]:
    patience = aiohttp.ClientTimeout(total=120)
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{off}", timeout=patience) as nothing,
        aiohttp.ClientSession(f"http://127.0.0.1:{on}", timeout=patience) as something,
    ):
        return await Client({OFF: nothing, COLD: something, AGAIN: something}, shape).rounds()


def _placement(shape: Shape, reuse: str) -> Placement:
    cores = sorted(os.sched_getaffinity(0))
    load = Load(
        streams=1, prompt_tokens=1, answer_tokens=1, every_seconds=1, window_seconds=1, seed=1
    )
    workers = placements([cores[0], cores[-1]], load)[-1].workers
    for worker in workers.values():
        worker["reuse"] = reuse
        worker["options"] |= {"dtype": shape.dtype, "pool_tokens": POOL_TOKENS}
    return Placement(name=f"reuse {reuse}", workers=workers)


def run(shape: Shape) -> int:
    """Measure and print; the exit code."""
    off, on = _placement(shape, "off"), _placement(shape, "on")
    try:
        with serving(off) as first, serving(on) as second:
            answers = uvloop.run(_measure(first, second, shape))
    except (NotStarted, OSError, aiohttp.ClientError) as error:
        print(error)
        return 1
    results = Results("reuse", msgspec.to_builtins(shape), ROOT / "bench-results")
    for answer in answers:
        results.add(msgspec.to_builtins(answer))
    print(
        f"\n{shape.shared_tokens} shared tokens and {shape.end_tokens} others, {shape.dtype},"
        f" {shape.rounds} rounds; milliseconds\n"
    )
    print(table(["", "TTFT p50", "p90", "first gap p50", "cached"], _rows(answers)))
    print(results.path)
    return 0


def _rows(answers: list[Answer]) -> list[list[str]]:
    rows = []
    for case in CASES:
        own = [it for it in answers if it.case == case]
        firsts, gaps = [it.first * 1e3 for it in own], [it.gap * 1e3 for it in own]
        shares = [percentile(firsts, 0.5), percentile(firsts, 0.9), percentile(gaps, 0.5)]
        rows.append([case, *(f"{it:.0f}" for it in shares), str(own[0].cached)])
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-tokens", type=int, default=1000)
    parser.add_argument("--end-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    unwind_when_told_to_stop()
    warn_if_busy()
    return run(
        Shape(
            shared_tokens=asked.shared_tokens,
            end_tokens=asked.end_tokens,
            rounds=asked.rounds,
            dtype=asked.dtype,
            seed=asked.seed,
        )
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
