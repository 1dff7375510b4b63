"""What pushing each layer while the next one is computed saves, over links of several speeds.

    python -m tests.bench.layerwise [--repeats 5] [--cases TEXT] [--folder bench-results]

From asking for a prefill to the first token that the other worker decodes: with layers pushed as
they become final, with all of them pushed at the end, and the ideal, which is the longer of
computing and moving (plus what a decode step takes). The real model, and the KV of an 8B model
whose computation is emulated. The link is emulated in the sender: a byte leaves no sooner than on
a link of that speed, so that what it shows beyond this machine's own limit is that limit; `moving`
is the larger of the two.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from gateway.cli.model import find_model
from loadtest.bench.figures import ROOT, Results, table, warn_if_busy
from loadtest.bench.process import unwind_when_told_to_stop
from tests.bench.desk.gateway import Handoff, desk
from tests.bench.desk.worker import Worker
from tests.bench.transfer.cases import HEAD_MAJOR, LLAMA, SEED, TOKEN_MAJOR

LINKS = (1.0, 10.0, 100.0)
WARM = 1
PREFILL_SECONDS_PER_TOKEN = 100e-6
"""Emulated: 10,000 tokens a second, about what one large GPU prefills of an 8B model."""


class Model(msgspec.Struct, frozen=True):
    """What computes, and how long its prompt is."""

    name: str
    backend: str
    tokens: int
    options: dict[str, Any]


def _models() -> tuple[Model, ...]:
    emulated = {
        "layers": LLAMA.layers,
        "kv_heads": LLAMA.kv_heads,
        "head_dim": LLAMA.head_dim,
        "dtype": LLAMA.dtype,
        "prefill_seconds_per_token": PREFILL_SECONDS_PER_TOKEN,
    }
    real = {"model": str(find_model("bundled"))}
    return (
        Model("SmolLM2-135M, computed", "emulation", 512, real),
        Model("Llama-3-8B, emulated", "synthetic", 2048, emulated),
    )


class Figure(msgspec.Struct, frozen=True):
    """Medians in seconds."""

    model: str
    tokens: int
    bytes: int
    link_gbit: float
    with_layers: float
    without: float
    computing: float
    moving: float
    step: float

    @property
    def ideal(self) -> float:
        """Neither waits for the other."""
        return max(self.computing, self.moving) + self.step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default="", help="only models whose name contains this")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    unwind_when_told_to_stop()
    warn_if_busy()
    configuration = {"repeats": options.repeats, "links_gbit": LINKS, "seed": SEED}
    results = Results("layerwise", configuration, options.folder)
    for model in _models():
        if options.cases not in model.name:
            continue
        figures = [_figure(model, link, options.repeats) for link in LINKS]
        for figure in figures:
            results.add({**msgspec.to_builtins(figure), "ideal": figure.ideal})
        _print(model, figures)
    print(f"\n{results.path}")


def _figure(model: Model, link: float, repeats: int) -> Figure:
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        by_layer, at_end = uvloop.run(_hand_over(Path(folder), model, link, repeats))
    return Figure(
        model=model.name,
        tokens=model.tokens,
        bytes=at_end[0].bytes,
        link_gbit=link,
        with_layers=statistics.median(it.until_decode for it in by_layer),
        without=statistics.median(it.until_decode for it in at_end),
        computing=statistics.median(it.prefill for it in (*by_layer, *at_end)),
        # With everything pushed at the end, what is exposed is the whole of moving it.
        moving=statistics.median(it.exposed for it in at_end),
        step=statistics.median(it.step for it in (*by_layer, *at_end)),
    )


async def _hand_over(
    folder: Path, model: Model, link: float, repeats: int
) -> tuple[list[Handoff], list[Handoff]]:
    """The same handoffs by layer and at the end, in turn, so that both see the same machine."""
    by_layer: list[Handoff] = []
    at_end: list[Handoff] = []
    _tell(f"{model.name}, {link:g} Gbit/s: starting two workers twice")
    async with (
        desk(folder / "by-layer", _workers(folder / "by-layer", model, link, False)) as one,
        desk(folder / "at-end", _workers(folder / "at-end", model, link, True)) as other,
    ):
        for number in range(WARM + repeats):
            _tell(f"{model.name}, {link:g} Gbit/s: {number + 1} of {WARM + repeats}")
            prompt = random.Random(SEED + number).choices(range(1000, 40000), k=model.tokens)
            by_layer.append(await one.hand_over(prompt))
            at_end.append(await other.hand_over(prompt))
    _tell("")
    return by_layer[WARM:], at_end[WARM:]


def _workers(folder: Path, model: Model, link: float, whole: bool) -> list[Worker]:
    folder.mkdir()
    pool = {"pool_tokens": model.tokens + 512}
    return [
        Worker(
            role="prefill",
            socket=str(folder / "prefill.sock"),
            backend=model.backend,
            options={**model.options, **pool, "block_tokens": 32, "axes": TOKEN_MAJOR},
            link_gbit=link,
            whole=whole,
        ),
        Worker(
            role="decode",
            socket=str(folder / "decode.sock"),
            backend=model.backend,
            options={**model.options, **pool, "block_tokens": 16, "axes": HEAD_MAJOR},
        ),
    ]


def _print(model: Model, figures: Sequence[Figure]) -> None:
    print(f"\n{model.name}: {model.tokens} tokens, {figures[0].bytes / 1e6:.0f} MB; milliseconds")
    header = ["", "computing", "moving", "by layer", "at the end", "ideal", "by layer / ideal"]
    rows = [
        [
            f"{it.link_gbit:g} Gbit/s",
            *(f"{value * 1e3:.0f}" for value in (it.computing, it.moving)),
            *(f"{value * 1e3:.0f}" for value in (it.with_layers, it.without, it.ideal)),
            f"{it.with_layers / it.ideal:.2f}",
        ]
        for it in figures
    ]
    print(table(header, rows))


def _tell(doing: str) -> None:
    """Say on a terminal what is being waited for."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
