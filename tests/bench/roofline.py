"""How far is the roofline from real engines on this CPU?

    python -m tests.bench.roofline [--threads 2] [--engines TEXT] [--folder bench-results]

The profile of this machine is measured, not fitted: the rate of one of the model's matrix products
in each dtype, the rate of reading memory, and what calling an operator costs. From that, the
model's sizes, and how often the engine calls and moves, it predicts the time of prompts and of
decode steps over batch and context, which is then measured on each engine. An error of -50 % says
that the step took twice as long as predicted. With one thread times are those of the CPU, which
other programs disturb less.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from backends.emulation.linear import Linear, bfloat16_is_fast
from backends.emulation.pool import TORCH_DTYPES
from backends.emulation.profile import Figure, Profile, Weights, load_shape
from backends.emulation.roofline import Roofline, Span
from loadtest.bench.figures import ROOT, Results, table, warn_if_busy
from tests.bench.contenders import BLOCK_TOKENS, Engine, Work
from tests.bench.engine import bundled_model

SHAPE = "smollm2-135m"
PROMPTS = (64, 256, 1024)
BATCHES = (1, 8, 32)
CONTEXTS = (64, 512)
MOST_TOKENS = 32 * 512 + 2048
READ_BYTES = 1 << 28
ROWS = 256
CALLS = 10_000
SECONDS = 0.4
LEAST_CALLS = 3
TORCH_OPERATORS = 30
"""What the torch engine calls in each layer of a step, as torch's own profiler counts."""

TORCH_PASSES = 3
"""How often it moves KV that it looks back on: to gather it from blocks it reads and writes it."""


class Case(msgspec.Struct, frozen=True):
    """A prompt of `context` tokens, or a decode step of `batch` sequences with as many."""

    phase: str
    batch: int
    context: int

    @property
    def label(self) -> str:
        """How the table names it."""
        tokens = f"{self.context} tokens"
        return tokens if self.phase == "prefill" else f"batch {self.batch}, {tokens}"

    def spans(self) -> list[Span]:
        """The rows of the step."""
        if self.phase == "prefill":
            return [Span(0, self.context, 1)]
        return [Span(self.context - 1, self.context, 1)] * self.batch


class Contender(msgspec.Struct, frozen=True):
    """An engine: the dtype it multiplies in, and how to make it.

    `kv_bytes` is what it moves for each number of KV that it looks back on, `operators` how many
    it calls in each layer.
    """

    name: str
    weights: Weights
    kv_bytes: int
    operators: int
    make: Callable[[], Engine]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", default="", help="only those whose name contains this")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    warn_if_busy()
    torch.set_num_threads(options.threads)
    results = Results("roofline", {"threads": options.threads, "shape": SHAPE}, options.folder)
    contenders = [it for it in _contenders(options.threads) if options.engines in it.name]
    for contender in contenders:
        profile = this_machine(contender.weights, contender.operators)
        results.add({"engine": contender.name, "profile": msgspec.to_builtins(profile)})
        _compare(contender, profile, results)
    print(f"\n{results.path}")


def this_machine(weights: Weights, operators: int) -> Profile:
    """What this CPU does with so many threads, measured now."""
    threads = torch.get_num_threads()
    one = Figure(1.0, "measured rates need none")
    none = Figure(0.0, "one device")
    return Profile(
        name=f"this CPU, {threads} threads",
        flops={weights: Figure(product_rate(weights), f"measured: gate and up, {ROWS} rows")},
        memory_bytes=Figure(8e9, "assumed"),
        memory_bytes_per_second=Figure(read_rate(), f"measured: summing {READ_BYTES >> 20} MiB"),
        link_bytes_per_second=Figure(1e9, "not used"),
        flops_efficiency=one,
        memory_efficiency=one,
        link_efficiency=one,
        memory_usable=one,
        step_seconds=none,
        layer_seconds=Figure(operators * call_seconds(), f"measured: {operators} small operators"),
        exchange_seconds=none,
    )


def product_rate(weights: Weights) -> float:
    """Operations per second of the product that is most of a layer: gate and up."""
    dtype, shape = TORCH_DTYPES[weights], load_shape(SHAPE)  # type: ignore[index]
    product = Linear(torch.rand(2 * shape.feed_forward, shape.hidden).to(dtype))
    rows = torch.rand(ROWS, shape.hidden).to(dtype)
    operations = 2 * ROWS * shape.hidden * 2 * shape.feed_forward
    return operations / _best(lambda: product(rows))


def read_rate() -> float:
    """Bytes per second of reading what is in no cache."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _best(numbers.sum)


def call_seconds() -> float:
    """What calling an operator costs that has next to nothing to do."""
    few = torch.ones(64)
    with torch.inference_mode():
        started = _now()
        for _ in range(CALLS):
            few.add(few)
    return (_now() - started) / CALLS


def _contenders(threads: int) -> Iterator[Contender]:
    model = bundled_model()
    names: list[Weights] = ["float32", *(["bfloat16"] if bfloat16_is_fast() else [])]
    for weights in names:
        yield Contender(
            f"torch {weights}",
            weights,
            TORCH_PASSES * TORCH_DTYPES[weights].itemsize,  # type: ignore[index]
            TORCH_OPERATORS,
            lambda weights=weights: Engine(model, MOST_TOKENS, weights),
        )
    if importlib.util.find_spec("onnxruntime"):
        yield Contender(
            "onnxruntime float32", "float32", 4, 0, lambda: OnnxRuntime(model, MOST_TOKENS, threads)
        )
    else:
        print("onnxruntime is left out: it is not installed")


class OnnxRuntime(Engine):
    """The other engine: one call for a step, and attention that reads KV where it lies."""

    name = "onnxruntime"

    def __init__(self, model: Path, pool_tokens: int, threads: int) -> None:
        from backends.onnxruntime import OnnxRuntimeBackend

        self.backend = OnnxRuntimeBackend(
            model=str(model), weights="float32", pool_tokens=pool_tokens,
            block_tokens=BLOCK_TOKENS, threads=threads,
        )  # fmt: skip


def _cases() -> Iterator[Case]:
    for tokens in PROMPTS:
        yield Case("prefill", 1, tokens)
    for batch in BATCHES:
        for context in CONTEXTS:
            yield Case("decode", batch, context)


def _compare(contender: Contender, profile: Profile, results: Results) -> None:
    roofline = Roofline(
        profile, load_shape(SHAPE), weights=contender.weights, kv_bytes=contender.kv_bytes
    )
    engine = contender.make()
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    rows = []
    for case in _cases():
        measured = _best(_work(engine, case))
        predicted = roofline.step_seconds(case.spans())
        error = predicted / measured - 1
        errors[case.phase].append(error)
        results.add({
            "engine": contender.name, **msgspec.to_builtins(case),
            "measured_seconds": measured, "predicted_seconds": predicted,
        })  # fmt: skip
        rows.append([
            f"{case.phase} {case.label}",
            f"{measured * 1e3:.1f}", f"{predicted * 1e3:.1f}", f"{error:+.0%}",
        ])  # fmt: skip
    print(f"\n{contender.name} on {profile.name}; milliseconds")
    print(table(["", "measured", "predicted", "error"], rows), flush=True)
    for phase, found in errors.items():
        mean = statistics.mean(map(abs, found))
        print(f"{phase}: {mean:.0%} in the mean, {min(found):+.0%} to {max(found):+.0%}")


def _work(engine: Engine, case: Case) -> Work:
    if case.phase == "prefill":
        return engine.prefill(case.context)
    return engine.decode(case.batch, case.context)


def _best(work: Work) -> float:
    """The shortest of several calls: other programs only ever lengthen one."""
    work()
    taken: list[float] = []
    ends = time.monotonic() + SECONDS
    while len(taken) < LEAST_CALLS or time.monotonic() < ends:
        started = _now()
        work()
        taken.append(_now() - started)
    return min(taken)


def _now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


if __name__ == "__main__":
    main()
