"""What the gateway costs, beside nginx and a bare proxy that only copy, in one run.

CPU time of the gateway's own process per streamed token and per short request, with workers that
compute nothing, the server under test alone on one core and everything else on another. This
process is the load generator. Start with `main`; the modes are in `MODES`.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import msgspec
import uvloop

from loadtest.bench.baton import baton
from loadtest.bench.client import LoadFailed, Window, hold_streams, short_requests
from loadtest.bench.figures import ROOT, Results, table, warn_if_busy
from loadtest.bench.process import NotStarted, raise_file_limit, unwind_when_told_to_stop
from loadtest.bench.servers import Cores, Target, bare_proxy, nginx, nginx_program
from loadtest.bench.upstream import Pace
from loadtest.bench.wire import post

WORDS = (
    "river",
    "stone",
    "bridge",
    "market",
    "quiet",
    "town",
    "rain",
    "harbour",
    "lantern",
    "road",
)
RAMP_SECONDS, STREAMS_STARTED_PER_SECOND = 4.0, 100.0
MEGABYTE = 1_000_000


class Mode(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of load. `target` bounds Baton's figure; `of_nginx` bounds it by nginx's.

    `warm_seconds` pass with all streams running before the window begins: synthetic tokens are
    drawn from the whole vocabulary alike, and a gateway works out each token's text once.
    """

    name: str
    title: str
    pace: Pace
    interval: float
    streams: int
    warm_seconds: float = 1.0
    once: bool = False
    figure: Literal["us/token", "us/request", "MB"]
    target: float = math.inf
    of_nginx: float = math.inf


MODES = (
    Mode(
        name="step",
        title="256 streams, all tokens of a step together, every 20 ms",
        pace="step",
        interval=0.02,
        streams=256,
        warm_seconds=10.0,
        figure="us/token",
        target=15.0,
    ),
    Mode(
        name="paced",
        title="256 streams, each on its own clock, a token every 20 ms",
        pace="paced",
        interval=0.02,
        streams=256,
        figure="us/token",
        of_nginx=0.9,
    ),
    Mode(
        name="short",
        title="short requests without streaming on 64 connections",
        pace="step",
        interval=0.002,
        streams=64,
        figure="us/request",
        target=600.0,
    ),
    Mode(
        name="memory",
        title="1,000 open streams, resident memory",
        pace="step",
        interval=0.1,
        streams=1000,
        once=True,
        figure="MB",
        target=150.0,
    ),
)
Start = Callable[[Path, Cores, Pace, float], AbstractContextManager[Target]]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is run, apart from the modes."""

    rounds: int
    window_seconds: float
    short_tokens: int
    prompt_words: int
    seed: int


def lifetime(mode: Mode, plan: Plan) -> float:
    """How long a stream must last, so that all of them run during the whole window."""
    starting = RAMP_SECONDS + mode.streams / STREAMS_STARTED_PER_SECOND
    return starting + mode.warm_seconds + plan.window_seconds


def requests_for(mode: Mode, plan: Plan) -> tuple[list[bytes], int]:
    """One request per stream (or to take turns with), and how many tokens each asks for."""
    rng = random.Random(plan.seed)
    tokens = plan.short_tokens
    if mode.figure != "us/request":
        tokens = math.ceil(lifetime(mode, plan) / mode.interval)
    requests = []
    for _ in range(mode.streams):
        body = {
            "model": "synthetic",
            "messages": [
                {"role": "user", "content": " ".join(rng.choices(WORDS, k=plan.prompt_words))}
            ],
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        if mode.figure != "us/request":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        requests.append(post("127.0.0.1", "/v1/chat/completions", msgspec.json.encode(body)))
    return requests, tokens


def measure(mode: Mode, start: Start, plan: Plan, cores: Cores) -> Window:
    """One window of one mode against one server.

    Raises:
        LoadFailed: the answers were not what was asked for.
        NotStarted: the server did not come up.
        OSError: the server cannot be reached, or the streams did not end in time (TimeoutError).
    """
    requests, tokens = requests_for(mode, plan)
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as folder,
        start(Path(folder), cores, mode.pace, mode.interval) as target,
    ):
        watched = {"server": target.pids, **target.others}
        if mode.figure == "us/request":
            load = short_requests(
                target.port,
                requests,
                connections=mode.streams,
                window_seconds=plan.window_seconds,
                watched=watched,
            )
        else:
            load = hold_streams(
                target.port,
                requests,
                expected_tokens=tokens,
                warm_seconds=mode.warm_seconds,
                window_seconds=plan.window_seconds,
                watched=watched,
                deadline_seconds=4 * lifetime(mode, plan) + 30,
            )
        return uvloop.run(load)


def figure(mode: Mode, window: Window) -> float:
    """The number that the mode is about."""
    if mode.figure == "MB":
        return window.rss["server"] / MEGABYTE
    return window.microseconds("server")


def median_window(mode: Mode, windows: Sequence[Window]) -> Window:
    """The window whose figure is the median."""
    middle = statistics.median_low([figure(mode, window) for window in windows])
    return next(window for window in windows if figure(mode, window) == middle)


def verdict(mode: Mode, value: float, nginx_value: float | None) -> str:
    """Whether Baton's figure is within the mode's bounds, in words."""
    if not math.isinf(mode.target):
        return f"{'met' if value <= mode.target else 'MISSED'}: at most {mode.target:g}"
    if nginx_value is None:
        return f"unknown without nginx: at most {mode.of_nginx:g} of it"
    met = value <= mode.of_nginx * nginx_value
    return f"{'met' if met else 'MISSED'}: at most {mode.of_nginx:g} of nginx"


def row(mode: Mode, name: str, windows: Mapping[str, Window]) -> list[str]:
    """One server's line in a mode's table."""
    window = windows[name]
    value = figure(mode, window)
    nginx_value = figure(mode, windows["nginx"]) if "nginx" in windows else None
    load = sum(window.cpu.values()) - window.cpu["server"] + window.own_cpu
    return [
        name,
        f"{value:.1f}",
        f"{value / nginx_value:.2f}" if nginx_value else "-",
        f"{window.rate:,.0f}",
        f"{100 * window.cpu['server'] / window.seconds:.0f} %",
        f"{100 * window.own_cpu / window.seconds:.0f} %",
        f"{100 * load / window.seconds:.0f} %",
        "-" if window.events_per_token is None else f"{window.events_per_token:.3f}",
        "-" if window.tokens_per_read is None else f"{window.tokens_per_read:.3f}",
        verdict(mode, value, nginx_value) if name == "baton" else "",
    ]


def header(mode: Mode) -> list[str]:
    """The columns of a mode's table."""
    rate = "req/s" if mode.figure == "us/request" else "tokens/s"
    return [
        "server",
        mode.figure,
        "x nginx",
        rate,
        "its core",
        "load gen.",
        "load core",
        "events/token",
        "tokens/read",
        "target",
    ]


def run(modes: Sequence[Mode], servers: Mapping[str, Start], plan: Plan, cores: Cores) -> bool:
    """Measure and print everything; False when a measurement failed."""
    configuration = {
        **msgspec.to_builtins(plan),
        "cores": {"server": sorted(cores.server or ()), "rest": sorted(cores.rest or ())},
        "modes": [msgspec.to_builtins(mode) for mode in modes],
    }
    results = Results("gateway", configuration, ROOT / "bench-results")
    complete = True
    for mode in modes:
        print(f"\n{mode.name}: {mode.title}")
        windows: dict[str, list[Window]] = {name: [] for name in servers}
        rounds = 1 if mode.once else plan.rounds
        for number in range(rounds):
            for name, start in servers.items():
                _progress(f"  round {number + 1} of {rounds}: {name}")
                try:
                    window = measure(mode, start, plan, cores)
                except (LoadFailed, NotStarted, OSError) as error:
                    complete = False
                    _progress("")
                    print(f"  {name}: {type(error).__name__}: {error}")
                    results.add({"mode": mode.name, "server": name, "error": str(error)})
                    continue
                windows[name].append(window)
                results.add({"mode": mode.name, "server": name, **msgspec.to_builtins(window)})
        _progress("")
        medians = {name: median_window(mode, each) for name, each in windows.items() if each}
        if medians:
            print(table(header(mode), [row(mode, name, medians) for name in medians]))
    print(f"\n{LEGEND}\n{results.path}")
    return complete


LEGEND = """\
Medians over the rounds. `its core`, `load core`: how busy the core of the server under test and
the core of the load (workers or upstream, and load generator) were; a full load core would hide
the truth. `events/token` is 1 when every token came in an event of its own (a little less where
tokens were half a character and had no text yet); figures are per event. `tokens/read` is 1 when
no two of a stream's tokens arrived together."""


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def choose_cores() -> Cores:
    """The first core for the server under test, the second for the rest, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("only one core: nothing is pinned, and the load shares it with the server under test")
        return Cores(server=None, rest=None)
    os.sched_setaffinity(0, {cores[1]})
    return Cores(server=frozenset({cores[0]}), rest=frozenset({cores[1]}))


def choose_servers(only: Sequence[str]) -> dict[str, Start]:
    """The servers to measure; says why one is left out."""
    servers: dict[str, Start] = {"baton": baton, "nginx": nginx, "bare proxy": bare_proxy}
    if nginx_program() is None:
        print("nginx is not installed, so there are no ratios to it (apt-get install -y nginx)")
        del servers["nginx"]
    return {name: start for name, start in servers.items() if not only or name in only}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="windows per server and mode")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of each window")
    parser.add_argument("--modes", nargs="*", choices=[m.name for m in MODES], default=[])
    parser.add_argument("--servers", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--short-tokens", type=int, default=8, help="tokens of a short answer")
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    plan = Plan(
        rounds=asked.rounds,
        window_seconds=asked.window,
        short_tokens=asked.short_tokens,
        prompt_words=asked.prompt_words,
        seed=asked.seed,
    )
    unwind_when_told_to_stop()
    warn_if_busy()
    raise_file_limit(16384)
    cores = choose_cores()
    modes = [mode for mode in MODES if not asked.modes or mode.name in asked.modes]
    return 0 if run(modes, choose_servers(asked.servers), plan, cores) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
