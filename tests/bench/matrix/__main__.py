"""Run the matrix and print it."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from backends.testing.alike import Bounds, bounds_of
from backends.testing.making import Maker
from gateway.cli.export import export
from gateway.logs import configure
from tests.bench.engine import bundled_model
from tests.bench.matrix.pair import Texts, alone, distance, forced, measured, say_all
from tests.bench.matrix.rows import ENGINES, PREFILLING, REFERENCE, Engine, prompts
from tests.bench.matrix.sides import Side, SteppedSide, side_of

POOL = {"pool_tokens": 4096, "context_tokens": 1024}


def main() -> int:
    """Measure and print; 1 where a pair is further apart than it may be."""
    options = _arguments()
    configure("error")
    model = str(options.model or bundled_model())
    engines = _present(options.engines)
    questions = prompts(model, options.prompts)
    lengths = sorted(map(len, questions))
    print(
        f"{len(questions)} prompts of {lengths[0]} to {lengths[-1]} tokens, {options.tokens} tokens"
        f" each, greedy, {options.threads} thread(s), {platform.machine()}"
    )
    lines: list[dict[str, Any]] = []
    for precision in ("float32", "mixed"):
        if options.precision in (precision, "both"):
            matrix = Matrix(model, precision, engines, questions, options)
            lines += matrix.run()
    if options.json:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0 if all(line["kept"] for line in lines) else 1


class Matrix:
    """One precision of it."""

    def __init__(
        self,
        model: str,
        precision: str,
        engines: list[Engine],
        questions: list[list[int]],
        options: argparse.Namespace,
    ) -> None:
        self._model, self._precision, self._threads = model, precision, options.threads
        self._tokens, self._questions = options.tokens, questions
        self._engines = [it for it in engines if it.options(precision) is not None]
        self._prefilling = [it for it in self._engines if it.name in named(options.prefill)]

    def run(self) -> list[dict[str, Any]]:
        """All pairs, and each engine alone where they are not of one precision."""
        exact = self._precision == "float32"
        print(f"\n{self._precision}: {'equal texts' if exact else 'KL, same likeliest token'}")
        with ExitStack() as stack:
            reference = self._side(stack, REFERENCE, "float32", decode=False)
            assert isinstance(reference, SteppedSide)
            texts = alone(reference.desk, self._questions, self._tokens)
            measure = [] if exact else measured(reference.desk, self._questions, texts)
        lines = []
        for prefill in self._prefilling:
            with ExitStack() as first:
                source = self._side(first, prefill, self._precision, decode=False)
                for decode in self._engines:
                    with ExitStack() as second:
                        target = self._side(second, decode, self._precision, decode=True)
                        found = {"prefill": prefill.name, "decode": decode.name}
                        found |= self._handed(source, target, texts)
                        if not exact:
                            found |= self._apart(source, target, texts, measure)
                    lines.append({"precision": self._precision, **found})
                    _print(lines[-1])
        return lines

    def _side(self, stack: ExitStack, engine: Engine, precision: str, *, decode: bool) -> Side:
        maker = Maker.of(engine.backend, engine.options(precision) or {})
        model = self._folder(stack) if engine.reads_folders else self._model
        wanted: dict[str, Any] = {"model": model, "threads": self._threads, **POOL}
        if not decode:
            wanted |= PREFILLING.get(engine.name, {})
        side = side_of(maker.make(**{it: wanted[it] for it in wanted if maker.takes(it)}))
        stack.callback(side.close)
        return side

    def _folder(self, stack: ExitStack) -> str:
        """The model in Hugging Face form, for as long as an engine has it open."""
        if Path(self._model).is_dir():
            return self._model
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-matrix-")))
        export(self._model, folder / "model")
        return str(folder / "model")

    def _handed(self, source: Side, target: Side, texts: Texts) -> dict[str, Any]:
        """Through two workers."""
        handed = asyncio.run(say_all(source.backend, target.backend, self._questions, self._tokens))
        equal = sum(ours == theirs for ours, theirs in zip(handed.texts, texts, strict=True))
        return {
            "transport": handed.transport,
            "conversion": handed.plan,
            "bytes_each": handed.nbytes // len(texts),
            "seconds_each": round(handed.seconds / len(texts), 3),
            "tokens_per_second": round(handed.tokens / handed.seconds, 1),
            "equal": equal,
            "prompts": len(texts),
            "kept": self._precision != "float32" or equal == len(texts),
        }

    def _apart(
        self, source: Side, target: Side, texts: Texts, measure: list[Any]
    ) -> dict[str, Any]:
        """Token by token."""
        bounds: Bounds = bounds_of(source.info.layout, target.info.layout)
        far = distance(forced(source, target, self._questions, texts), measure)
        return {
            "kl": float(f"{far.kl:.2g}"),
            "top1": round(far.top1, 3),
            "bounds": bounds.name,
            "kept": far.kl <= bounds.kl and far.top1 >= bounds.top1,
        }


def _print(line: dict[str, Any]) -> None:
    said = f"{line['equal']}/{line['prompts']}"
    if "kl" in line:
        said = f"KL {line['kl']:.2g}, {line['top1']:.1%} ({line['bounds']})"
    print(
        f"{line['prefill']:>12} -> {line['decode']:<12} {said:28} {'' if line['kept'] else 'NOT'}"
        f" {line['bytes_each'] / 1e6:5.1f} MB {line['seconds_each']:7.3f} s"
        f" {line['tokens_per_second']:6.1f} tok/s  {line['transport']}: {line['conversion']}",
        flush=True,
    )


def named(names: str) -> list[str]:
    """Engines by commas; all where none is named."""
    return names.split(",") if names else [it.name for it in ENGINES]


def _present(names: str) -> list[Engine]:
    found = [it for it in ENGINES if it.name in named(names)]
    for engine in found:
        if not engine.installed:
            print(f"without {engine.name}: no module {engine.needs} here", file=sys.stderr)
    return [it for it in found if it.installed]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="GGUF file or folder")
    parser.add_argument("--precision", choices=("float32", "mixed", "both"), default="both")
    parser.add_argument("--engines", default="", help="names, by commas; all unless given")
    parser.add_argument("--prefill", default="", help="those that prefill; all unless given")
    parser.add_argument("--prompts", type=int, default=32, help="1 to 32")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="file for the figures")
    options = parser.parse_args()
    if not 1 <= options.prompts <= 32 or options.tokens < 2 or options.threads < 1:
        parser.error("1 to 32 prompts, 2 tokens or more, 1 thread or more")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
