"""Two engines together beside either alone: torch for prompts, ONNX Runtime for the tokens after.

The real model, a prefill and a decode worker with a core each, three times over: both torch, both
ONNX Runtime, and one of each, as `baton serve` starts them. The three take turns with the same
requests, one stream at a time and several at once. Start with `CASES`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import aiohttp
import msgspec
import uvloop

from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import NotStarted, unwind_when_told_to_stop
from loadtest.interference import FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN, Placement, serving
from loadtest.sse import Events

POOL_TOKENS = 8192
"""Enough for eight streams, and little enough that all pairs fit into memory."""

TORCH, ONNX = "emulation", "onnxruntime"
CASES = {
    "torch alone": (TORCH, TORCH),
    "ONNX Runtime alone": (ONNX, ONNX),
    "torch, then ONNX Runtime": (TORCH, ONNX),
}
"""Which engine prefills, and which decodes."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked, `streams` at a time."""

    prompt_tokens: int
    answer_tokens: int
    streams: tuple[int, ...]
    rounds: int
    seed: int


class Heard(msgspec.Struct, frozen=True):
    """Of one answer: seconds from the request to each of its tokens."""

    times: list[float]

    @property
    def first(self) -> float:
        """Until the first token."""
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        """Between tokens."""
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]


class Figures(msgspec.Struct, frozen=True):
    """One case with so many streams, over all rounds."""

    case: str
    streams: int
    first_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    tokens_per_second: float
    """Of each stream, by the median gap: streams that wait for their first token do not count."""


def workers(prefill: str, decode: str) -> dict[str, dict[str, Any]]:
    """A pair of these engines, each in the layout that `baton serve` gives it."""
    cores = sorted(os.sched_getaffinity(0))
    cut = {"block_tokens": 32, "axes": "layer kv block token head dim"}
    sides = {"prefill": (prefill, cores[0], cut), "decode": (decode, cores[-1], {})}
    return {
        role: {
            "role": role,
            "backend": backend,
            "threads": 1,
            "cpus": [core],
            "unlike_weights": prefill != decode,
            "reuse": "off",
            "options": {
                "pool_tokens": POOL_TOKENS,
                **options,
                **({"kv_dtype": "float16"} if backend == ONNX else {}),
            },
        }
        for role, (backend, core, options) in sides.items()
    }


async def ask(site: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Heard:
    """One streamed answer."""
    loop = asyncio.get_running_loop()
    body = {
        "model": "real",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    began, times = loop.time(), list[float]()
    async with site.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        events = Events()
        async for piece in response.content.iter_any():
            for data in events.feed(piece):
                told: Any = {} if data == "[DONE]" else msgspec.json.decode(data)
                for choice in told.get("choices", ()):
                    times += [loop.time() - began] * len(choice.get("token_ids") or ())
    return Heard(times)


async def measure(ports: dict[str, int], shape: Shape) -> list[Figures]:
    """All cases in turn, round after round; the first round warms up."""
    rng = random.Random(shape.seed)
    heard: dict[tuple[str, int], list[Heard]] = {}
    async with AsyncExitStack() as stack:
        patience = aiohttp.ClientTimeout(total=300)
        sites = {
            case: await stack.enter_async_context(
                aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=patience)
            )
            for case, port in ports.items()
        }
        for number in range(shape.rounds + 1):
            for streams in shape.streams:
                prompts = [
                    [
                        rng.randint(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN)
                        for _ in range(shape.prompt_tokens)
                    ]
                    for _ in range(streams)
                ]
                for case, site in sites.items():
                    answers = await asyncio.gather(
                        *(ask(site, prompt, shape.answer_tokens) for prompt in prompts)
                    )
                    if number:
                        heard.setdefault((case, streams), []).extend(answers)
    return [figures(case, streams, answers) for (case, streams), answers in heard.items()]


def figures(case: str, streams: int, answers: list[Heard]) -> Figures:
    """What so many answers come to."""
    gaps = [gap for answer in answers for gap in answer.gaps]
    middle = percentile(gaps, 0.5)
    return Figures(
        case,
        streams,
        1e3 * percentile([answer.first for answer in answers], 0.5),
        1e3 * middle,
        1e3 * percentile(gaps, 0.99),
        1 / middle,
    )


HEADER = [
    "engines",
    "streams",
    "first token ms",
    "gap p50 ms",
    "p99 ms",
    "tokens/s each",
    "x torch",
]


def rows(found: list[Figures]) -> Iterator[list[str]]:
    """The lines of the table."""
    base = {it.streams: it.tokens_per_second for it in found if it.case == "torch alone"}
    for it in sorted(found, key=lambda it: it.streams):
        yield [
            it.case,
            str(it.streams),
            f"{it.first_ms:.0f}",
            f"{it.gap_p50_ms:.1f}",
            f"{it.gap_p99_ms:.1f}",
            f"{it.tokens_per_second:.0f}",
            f"{it.tokens_per_second / base[it.streams]:.2f}",
        ]


def run(shape: Shape) -> int:
    """Measure and print; the exit code."""
    try:
        with ExitStack() as stack:
            ports = {
                case: stack.enter_context(serving(Placement(name=case, workers=workers(*pair))))
                for case, pair in CASES.items()
            }
            found = uvloop.run(measure(ports, shape))
    except (NotStarted, OSError, aiohttp.ClientError) as error:
        print(error)
        return 1
    print(
        f"\nprompts of {shape.prompt_tokens} tokens, answers of {shape.answer_tokens},"
        f" {shape.rounds} rounds"
    )
    results = Results("engines", msgspec.to_builtins(shape), ROOT / "bench-results")
    for it in found:
        results.add(msgspec.to_builtins(it))
    print(table(HEADER, list(rows(found))))
    print(results.path)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(arguments)
    warn_if_busy()
    unwind_when_told_to_stop()
    return run(
        Shape(
            prompt_tokens=asked.prompt_tokens,
            answer_tokens=asked.answer_tokens,
            streams=tuple(asked.streams),
            rounds=asked.rounds,
            seed=asked.seed,
        )
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
