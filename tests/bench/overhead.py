"""What a handoff costs beyond moving its bytes, between two worker processes.

    python -m tests.bench.overhead [--handoffs 1000] [--folder bench-results]

A prompt of 128 tokens, synthetic backends that compute in no time, one request at a time, so that
the decode worker is idle. `reserve` is asking for the landing and having it; `landing` begins with
the first token, when prefill is over, and ends when decode has verified and admitted the prefix.
From their sum is taken what a bare socket needs for the same bytes, measured in the same run. The
wait for the decode worker's step comes after that and is shown apart.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import unwind_when_told_to_stop
from tests.bench.desk.gateway import Handoff, desk
from tests.bench.desk.worker import Worker
from tests.bench.transfer.cases import HEAD_MAJOR, SEED, SMOL, TOKEN_MAJOR, Case
from tests.bench.transfer.pair import paired

TOKENS = 128
WARM = 20
AIMS = {0.5: 1e-3, 0.99: 3e-3}
SHAPE = {
    "layers": SMOL.layers,
    "kv_heads": SMOL.kv_heads,
    "head_dim": SMOL.head_dim,
    "dtype": SMOL.dtype,
    "pool_tokens": 4096,
}
PARTS: dict[str, Callable[[Handoff], float]] = {
    "reserve": lambda it: it.reserve,
    "landing": lambda it: it.landing,
    "  of it verify": lambda it: it.verify,
    "  of it the rest": lambda it: it.landing - it.verify,
    "(last layer ready to commit answered, without verify)": lambda it: it.exposed,
    "(wait for the step, and the step)": lambda it: it.step,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--handoffs", type=int, default=1000)
    parser.add_argument("--transports", default="tcp,shm", help="one after the other")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    unwind_when_told_to_stop()
    warn_if_busy()
    for transport in options.transports.split(","):
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
            handoffs, how = uvloop.run(_measure(Path(folder), transport, options.handoffs))
            moving = _bare_socket(Path(folder))
        configuration = {"handoffs": options.handoffs, "tokens": TOKENS, "met": how}
        results = Results(f"overhead-{transport}", configuration, options.folder)
        results.add({"bare_socket_seconds": moving})
        for handoff in handoffs:
            results.add(msgspec.to_builtins(handoff))
        _print(handoffs, moving, how)
        print(f"{results.path}\n")


async def _measure(folder: Path, transport: str, count: int) -> tuple[list[Handoff], str]:
    unlike: dict[str, dict[str, Any]] = {
        "prefill": {"block_tokens": 32, "axes": TOKEN_MAJOR},
        "decode": {"block_tokens": 16, "axes": HEAD_MAJOR},
    }
    workers = [
        Worker(
            role=role,  # type: ignore[arg-type]
            socket=str(folder / f"{role}.sock"),
            backend="synthetic",
            options={**SHAPE, **options},
            transport=transport,  # type: ignore[arg-type]
        )
        for role, options in unlike.items()
    ]
    async with desk(folder, workers) as gateway:
        handoffs = []
        for number in range(WARM + count):
            _tell(f"{transport}: handoff {number} of {WARM + count}")
            prompt = random.Random(SEED + number).choices(range(1000, 40000), k=TOKENS)
            handoffs.append(await gateway.hand_over(prompt))
        _tell("")
        return handoffs[WARM:], f"{gateway.met.transport}: {gateway.met.plan}"


def _bare_socket(folder: Path) -> float:
    """Seconds that a bare socket needs for the same bytes."""
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        case = Case(SMOL, TOKENS, "unequal")
        pair = stack.enter_context(paired("bare socket", case, folder, (cores[0], cores[-1])))
        pair.go(WARM)
        return percentile(pair.go(200).seconds, 0.5)


def _print(handoffs: Sequence[Handoff], moving: float, how: str) -> None:
    print(f"{len(handoffs)} handoffs of {TOKENS} tokens, {handoffs[0].bytes / 1e6:.2f} MB, {how}")
    beyond = {share: _share(handoffs, _beyond(moving), share) for share in AIMS}
    rows = [
        [name, *(f"{_share(handoffs, part, share) * 1e3:.3f}" for share in AIMS)]
        for name, part in PARTS.items()
    ]
    rows.append(["moving the same bytes over a bare socket", f"{moving * 1e3:.3f}", ""])
    rows.append(["beyond moving", *(f"{beyond[share] * 1e3:.3f}" for share in AIMS)])
    rows.append(["aim", *(f"{aim * 1e3:.3f}" for aim in AIMS.values())])
    rows.append(["", *("met" if beyond[share] <= aim else "MISSED" for share, aim in AIMS.items())])
    print(table(["milliseconds", "p50", "p99"], rows))


def _beyond(moving: float) -> Callable[[Handoff], float]:
    return lambda it: it.reserve + it.landing - moving


def _share(handoffs: Sequence[Handoff], part: Callable[[Handoff], float], share: float) -> float:
    return percentile([part(it) for it in handoffs], share)


def _tell(doing: str) -> None:
    """Say on a terminal what is being waited for."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
