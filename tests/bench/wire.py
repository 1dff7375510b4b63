"""What codes of eight bits on the wire cost in exactness, and what they save.

    python -m tests.bench.wire [--part exactness|time] [--folder bench-results]

Exactness: the real model in float32. The KV of 32 prompts goes through each form; then 64 tokens
are decoded from it, once along the words of the undisturbed run (KL divergence of the next token,
and whether the likeliest one is the same) and once freely (how far the words are the same).

Time: KV of the size of an 8B model's in bfloat16, made up, from a prefill to a decode worker over
`tcp` on links of several speeds, with and without codes, in turn; nothing leaves before the first
token is there, so that all of the way shows. A link is emulated in the sender: a byte leaves no
sooner than on a link of that speed. A pair that is set to codes uses them only where it finds them
faster, so its row says what it chose.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import uvloop
from numpy.typing import NDArray

from backends.api import Row
from backends.emulation import EmulationBackend
from backends.emulation.plan import make_plan
from backends.protocol import Role
from gateway.cli.model import find_model
from loadtest.bench.figures import ROOT, Results, percentile, table, warn_if_busy
from loadtest.bench.process import unwind_when_told_to_stop
from tests.bench.desk.gateway import Handoff, desk
from tests.bench.desk.worker import Worker
from tests.bench.transfer.cases import HEAD_MAJOR, SEED, TOKEN_MAJOR
from tests.emulation.desk import Desk as Engine
from tests.emulation.desk import Line, canonical
from tests.support.prompts import prompts
from transfer.coded import Encoder, decode
from transfer.coding import CODECS, Codec, coded_layout, plain_layout
from transfer.contract import KVSlice, Source
from transfer.plan import plan

WORDS = 64
BLOCK_TOKENS = 16
LINKS = (0.25, 1.0, 10.0)
"""Gbit/s; 0 is as fast as this machine."""

SHAPE = "llama-3.1-8b"

TOKENS = 512
WARM = 1

Blocks = list[int]
Form = Callable[["Exactness", Blocks, Blocks, int], None]


class Exactness:
    """The real model, and the KV of all prompts, pristine and in a form that was on the wire."""

    def __init__(self, count: int) -> None:
        self.prompts = [list(it) for it in prompts()[:count]]
        room = sum(-(-(len(it) + WORDS + 1) // BLOCK_TOKENS) for it in self.prompts)
        self.backend = EmulationBackend(
            model=str(find_model("bundled")), dtype="float32", block_tokens=BLOCK_TOKENS,
            pool_blocks=2 * room + 1, axes=HEAD_MAJOR,
        )  # fmt: skip
        self.layout = self.backend.info.layout
        self._desk = Engine(self.backend)
        self._pristine = [Line(it) for it in self.prompts]
        for line in self._pristine:
            self._desk.prefill(line)
        self._lines = [Line(it) for it in self.prompts]
        for line, tokens in zip(self._lines, self.prompts, strict=True):
            self._desk.cover(line, len(tokens) + WORDS + 1)

    def words(self, form: Form) -> list[list[int]]:
        """What each prompt is continued with, from KV in that form."""
        self._bring(form)
        for line, first in zip(self._lines, self._pristine, strict=True):
            line.sequence.generated[:] = first.generated
        self._desk.decode(self._lines, WORDS)
        return [list(line.generated) for line in self._lines]

    def next_words(self, form: Form, words: list[list[int]]) -> Iterator[torch.Tensor]:
        """For each prompt the log probabilities [word, vocabulary] along given words."""
        self._bring(form)
        for line, tokens, spoken in zip(self._lines, self.prompts, words, strict=True):
            row = Row(
                tokens=spoken[:WORDS],
                start=len(tokens),
                blocks=line.blocks,
                prompt_logprobs=0,
                following=spoken[1:WORDS],
            )
            yield torch.log_softmax(self._logits(row), -1)

    def _logits(self, row: Row) -> torch.Tensor:
        engine: Any = self.backend
        with torch.inference_mode():
            made = make_plan([row], engine._pool, engine._dtype, "cpu")
            states = engine._model.forward(made, engine._pool, lambda layer: None)
            logits: torch.Tensor = engine._model.logits(states)
        return logits

    def _bring(self, form: Form) -> None:
        for line, first, tokens in zip(self._lines, self._pristine, self.prompts, strict=True):
            count = self.layout.blocks_for(len(tokens))
            form(self, first.blocks[:count], line.blocks[:count], len(tokens))


def as_it_is(work: Exactness, source: Blocks, target: Blocks, _tokens: int) -> None:
    """Undisturbed."""
    work.backend.copy_blocks(list(zip(source, target, strict=True)))


def rounded(dtype: torch.dtype) -> Form:
    """As numbers of 16 bits."""

    def form(work: Exactness, source: Blocks, target: Blocks, _tokens: int) -> None:
        view: NDArray[Any] = canonical(work.backend).view(np.float32)
        numbers = torch.from_numpy(view[:, :, source]).to(dtype).float()
        view[:, :, target] = numbers.numpy()

    return form


def coded(codec: Codec) -> Form:
    """As codes."""

    def form(work: Exactness, source: Blocks, target: Blocks, tokens: int) -> None:
        layout, pool, blocks = work.layout, work.backend.pool, work.backend.info.pool_blocks
        there = coded_layout(layout, codec)
        groups = there.blocks_for(tokens)
        buffer = np.zeros(groups * there.block_bytes, np.uint8)
        padded = groups * there.block_tokens
        codes = Source(there, buffer, groups, tuple(range(groups)), padded)
        ours = Source(layout, pool, blocks, tuple(source), tokens)
        encoder = Encoder(plan(layout, plain_layout(layout)), ours, codes, codec)
        encoder.encode(KVSlice(0, 0, tokens, layout.layers))
        decode(codec, codes, tokens, layout, pool, blocks, tuple(target))

    return form


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=("exactness", "time"), default=None)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--links", type=float, nargs="*", default=LINKS, help="Gbit/s; 0: any")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-results")
    options = parser.parse_args()
    unwind_when_told_to_stop()
    warn_if_busy()
    results = Results("wire", {"prompts": options.prompts, "words": WORDS}, options.folder)
    if options.part != "time":
        torch.set_num_threads(options.threads)
        _exactness(options.prompts, results)
    if options.part != "exactness":
        _times(options.links, options.repeats, results)
    print(f"\n{results.path}")


def _exactness(count: int, results: Results) -> None:
    work = Exactness(count)
    spoken = work.words(as_it_is)
    right = list(work.next_words(as_it_is, spoken))
    forms: dict[str, tuple[float, Form]] = {
        "float16": (2.0, rounded(torch.float16)),
        "bfloat16": (2.0, rounded(torch.bfloat16)),
    }
    for codec in CODECS:
        there = coded_layout(work.layout, codec)
        forms[codec] = there.token_bytes / work.layout.token_bytes * 4, coded(codec)
    rows = []
    numbers = work.layout.token_bytes // work.layout.item_bytes
    for name, (bytes_each, form) in forms.items():
        found = work.words(form)
        same = [_alike(ours, theirs) for ours, theirs in zip(found, spoken, strict=True)]
        divergence, agreed = _along(right, work.next_words(form, spoken))
        line = {
            "form": name,
            "token_bytes": round(numbers * bytes_each),
            "same_words": sum(it == WORDS for it in same),
            "mean_words": statistics.mean(same),
            "kl_mean": statistics.mean(divergence),
            "kl_p99": percentile(divergence, 0.99),
            "likeliest_agrees": agreed,
        }
        results.add(line)
        rows.append([
            name, f"{line['token_bytes']:,}", f"{line['same_words']}/{count}",
            f"{line['mean_words']:.1f}", f"{line['kl_mean']:.1e}", f"{line['kl_p99']:.1e}",
            f"{agreed:.1%}",
        ])  # fmt: skip
    header = [
        "",
        "bytes a token",
        f"all {WORDS} words",
        "words alike",
        "KL mean",
        "KL p99",
        "top-1",
    ]
    print(table(header, rows), flush=True)


def _alike(ours: list[int], theirs: list[int]) -> int:
    """How many words after the first, which is prefill's, are the same before one is not."""
    pairs = zip(ours[1:], theirs[1:], strict=True)
    return next((it for it, (one, other) in enumerate(pairs) if one != other), WORDS)


def _along(right: list[torch.Tensor], found: Iterator[torch.Tensor]) -> tuple[list[float], float]:
    """KL divergences of all words, and how often the likeliest is the same."""
    divergence: list[float] = []
    agreed: list[bool] = []
    for one, other in zip(right, found, strict=True):
        divergence += (one.exp() * (one - other)).sum(-1).clamp(min=0).tolist()
        agreed += (one.argmax(-1) == other.argmax(-1)).tolist()
    return divergence, statistics.mean(map(float, agreed))


class Figure(msgspec.Struct, frozen=True):
    """Medians in seconds, from the first token to the admission at the other worker."""

    link_gbit: float
    set_to: str
    chosen: str
    bytes: int
    seconds: float


def _times(links: Sequence[float], repeats: int, results: Results) -> None:
    rows = []
    for link in links:
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
            plain, *others = uvloop.run(_beside(Path(folder), link, repeats))
        for figure in (plain, *others):
            results.add(msgspec.to_builtins(figure))
        rows += [_row(plain, figure) for figure in others]
    header = ["link", "set to", "without, ms", "with, ms", "with / without", "chosen", "bytes"]
    print(f"\n{TOKENS} tokens of {SHAPE}, {plain.bytes / 1e6:.0f} MB without codes")
    print(table(header, rows), flush=True)


def _row(plain: Figure, figure: Figure) -> list[str]:
    link = figure.link_gbit
    return [
        f"{link:g} Gbit/s" if link else "loopback",
        figure.set_to,
        f"{plain.seconds * 1e3:.0f}",
        f"{figure.seconds * 1e3:.0f}",
        f"{figure.seconds / plain.seconds:.2f}",
        figure.chosen,
        f"{figure.bytes / plain.bytes:.2f}",
    ]


async def _beside(folder: Path, link: float, repeats: int) -> list[Figure]:
    """The same handoffs without and with codes, in turn, so that all see the same machine."""
    settings: list[tuple[Codec, ...]] = [(), *((codec,) for codec in CODECS)]
    handoffs: list[list[Handoff]] = [[] for _ in settings]
    async with AsyncExitStack() as stack:
        desks = []
        for number, wire in enumerate(settings):
            room = folder / str(number)
            desks.append(await stack.enter_async_context(desk(room, _workers(room, link, wire))))
        for number in range(WARM + repeats):
            prompt = random.Random(SEED + number).choices(range(1000, 40000), k=TOKENS)
            for made, taken in zip(desks, handoffs, strict=True):
                taken.append(await made.hand_over(prompt))
        chosen = [made.met.transport for made in desks]
    return [
        Figure(
            link_gbit=link,
            set_to=" ".join(wire),
            chosen=transport,
            bytes=taken[-1].bytes,
            seconds=statistics.median(it.landing for it in taken[WARM:]),
        )
        for wire, transport, taken in zip(settings, chosen, handoffs, strict=True)
    ]


def _workers(folder: Path, link: float, wire: tuple[Codec, ...]) -> list[Worker]:
    folder.mkdir()
    options = {"model_shape": SHAPE, "dtype": "bfloat16", "pool_tokens": 2 * TOKENS}
    ends: list[tuple[Role, int, str]] = [
        ("prefill", 32, TOKEN_MAJOR), ("decode", 16, HEAD_MAJOR),
    ]  # fmt: skip
    return [
        Worker(
            role=role,
            socket=str(folder / f"{role}.sock"),
            backend="synthetic",
            options={**options, "block_tokens": block, "axes": axes},
            link_gbit=link if role == "prefill" else 0.0,
            whole=role == "prefill",
            transport="tcp",
            wire=wire,
            inexact=True,
        )
        for role, block, axes in ends
    ]


if __name__ == "__main__":
    main()
