"""Measure how fast KV moves between two processes, beside what this machine could do.

    python -m tests.bench.transfer [--cases TEXT] [--rounds 7] [--folder bench-results]

Sender and receiver are a process each, on a core each. Every contender moves the same bytes,
paged over pools larger than the prefix, in rounds whose order is shuffled; a figure is the median
over all transfers of all rounds. A transfer ends when its sender knows that all of it has arrived.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from loadtest.bench.figures import ROOT, Results, table, warn_if_busy
from loadtest.bench.process import running, unwind_when_told_to_stop
from tests.bench.transfer.aims import judge
from tests.bench.transfer.cases import LLAMA, SEED, SMOL, Case
from tests.bench.transfer.contenders import CONTENDERS
from tests.bench.transfer.pair import LeftOut, Pair, Round, paired

ROUND_BYTES = 300_000_000
MAX_PER_ROUND = 100

CASES = (
    Case(SMOL, 48, "equal"),
    Case(SMOL, 128, "equal"),
    Case(SMOL, 1024, "equal"),
    Case(SMOL, 2784, "equal"),
    Case(SMOL, 8192, "equal"),
    Case(LLAMA, 2048, "equal"),
    Case(LLAMA, 2048, "in order"),
    Case(SMOL, 1024, "regrouped"),
    Case(SMOL, 128, "unequal"),
    Case(SMOL, 1024, "unequal"),
    Case(LLAMA, 2048, "unequal"),
    Case(SMOL, 1024, "cast"),
)
BUSY = Case(SMOL, 2784, "equal")
WHO_WHEN_BUSY = ("bare socket", "Baton tcp", "Baton tcp, no digest", "Baton shm")
CONVERTING = frozenset({"numpy", "torch", "Baton, conversion"})


class Figure(msgspec.Struct, frozen=True):
    """What one contender did in one case."""

    case: str
    contender: str
    bytes: int
    gb_per_second: float
    lowest: float
    highest: float
    sender_cpu_per_gb: float
    receiver_cpu_per_gb: float
    transfers: int
    busy: bool


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--contenders", default="", help="only these, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    unwind_when_told_to_stop()
    warn_if_busy()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("two cores are needed, one for each process")
    names = [it.strip() for it in options.contenders.split(";") if it.strip()] or list(CONTENDERS)
    results = Results(
        "transfer",
        {"rounds": options.rounds, "cores": cores, "seed": SEED, "contenders": names},
        options.folder,
    )
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        bench = Bench(Path(folder), (cores[0], cores[1]), options.rounds, results)
        for case in CASES:
            if options.cases in case.name:
                bench.show(case, [it for it in names if _takes_part(it, case)])
        if options.cases in "both cores busy":
            bench.show_busy([it for it in names if it in WHO_WHEN_BUSY])
    print(f"\n{results.path}")


def _takes_part(name: str, case: Case) -> bool:
    """Permutations are measured where there is one."""
    return name not in CONVERTING or case.permuted


class Bench:
    """Measures cases and prints them."""

    def __init__(self, folder: Path, cores: tuple[int, int], rounds: int, results: Results) -> None:
        self._folder = folder
        self._cores = cores
        self._rounds = rounds
        self._results = results

    def show(self, case: Case, names: Sequence[str]) -> None:
        """Measure one case and print its table."""
        figures, left_out = self._measure(case, names, busy=False)
        speeds = {it.contender: it.gb_per_second for it in figures}
        runs = case.runs()
        print(f"\n{case.name}: {case.size / 1e6:.1f} MB in {len(runs)} runs")
        rows = [
            [
                it.contender,
                f"{it.gb_per_second:.2f}",
                f"{it.lowest:.2f}..{it.highest:.2f}",
                _ratio(it.gb_per_second, speeds.get("bare socket")),
                _ratio(it.gb_per_second, speeds.get("memcpy")),
                f"{it.sender_cpu_per_gb:.2f}",
                f"{it.receiver_cpu_per_gb:.2f}",
                judge(case, it.contender, speeds),
            ]
            for it in figures
        ]
        header = ["", "GB/s", "10..90 %", "of socket", "of memcpy", "CPU s/GB", "receiver", ""]
        print(table(header, rows))
        for line in left_out:
            print(f"left out: {line}")

    def show_busy(self, names: Sequence[str]) -> None:
        """The same with a spinning process on each core, beside the same without."""
        quiet, left_out = self._measure(BUSY, names, busy=False)
        spinning = "while True: pass"
        with ExitStack() as stack:
            for core in self._cores:
                command = [sys.executable, "-c", spinning]
                log = self._folder / f"spin-{core}.log"
                stack.enter_context(running(command, log, cores=frozenset({core})))
            busy, _ = self._measure(BUSY, [it.contender for it in quiet], busy=True)
        print(f"\n{BUSY.name}, with both cores busy")
        rows = [
            [
                one.contender,
                f"{one.gb_per_second:.2f}",
                f"{other.gb_per_second:.2f}",
                _ratio(other.gb_per_second, one.gb_per_second),
            ]
            for one in quiet
            for other in busy
            if other.contender == one.contender
        ]
        print(table(["", "quiet GB/s", "busy GB/s", "kept (aim 0.5)"], rows))
        for line in left_out:
            print(f"left out: {line}")

    def _measure(
        self, case: Case, names: Sequence[str], *, busy: bool
    ) -> tuple[list[Figure], list[str]]:
        """Figures of those who took part, in the order of `names`, and why others did not."""
        count = max(1, min(MAX_PER_ROUND, round(ROUND_BYTES / case.size)))
        left_out: list[str] = []
        rounds: dict[str, list[Round]] = {}
        with ExitStack() as stack:
            pairs = {}
            for name in names:
                _tell(f"{case.name}: starting {name}")
                try:
                    pairs[name] = self._start(stack, name, case)
                except LeftOut as error:
                    left_out.append(str(error))
            for number in range(self._rounds):
                order = list(pairs)
                random.Random(SEED + number).shuffle(order)
                for name in order:
                    _tell(f"{case.name}: round {number + 1} of {self._rounds}, {name}")
                    rounds.setdefault(name, []).append(pairs[name].go(count))
        _tell("")
        figures = [_figure(case, name, rounds[name], busy) for name in names if name in rounds]
        for figure in figures:
            self._results.add(msgspec.to_builtins(figure))
        return figures, left_out

    def _start(self, stack: ExitStack, name: str, case: Case) -> Pair:
        pair = stack.enter_context(paired(name, case, self._folder, self._cores))
        pair.go(1)
        pair.check()
        return pair


def _figure(case: Case, name: str, rounds: Sequence[Round], busy: bool) -> Figure:
    speeds = sorted(case.size / 1e9 / took for it in rounds for took in it.seconds)
    moved = len(speeds) * case.size / 1e9
    return Figure(
        case=case.name,
        contender=name,
        bytes=case.size,
        gb_per_second=statistics.median(speeds),
        lowest=speeds[len(speeds) // 10],
        highest=speeds[len(speeds) * 9 // 10],
        sender_cpu_per_gb=sum(it.sender_cpu for it in rounds) / moved,
        receiver_cpu_per_gb=sum(it.receiver_cpu for it in rounds) / moved,
        transfers=len(speeds),
        busy=busy,
    )


def _ratio(speed: float, beside: float | None) -> str:
    return f"{speed / beside:.2f}" if beside else ""


def _tell(doing: str) -> None:
    """Say on a terminal what is being waited for."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
