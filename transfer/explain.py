"""Say what a handoff between two layouts will do, and what it costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from transfer.contract import Source, whole
from transfer.convert import Conversion
from transfer.digest import PrefixDigest
from transfer.layout import Epoch, KVLayout, Landing
from transfer.plan import Plan, plan
from transfer.pool import Pool
from transfer.warming import warm_up

SAMPLE_BYTES = 64 << 20
"""About as much of the target is converted to see how long it takes."""

SPREAD = 7
"""Blocks of the sample lie so many apart, as in a pool that has been in use."""


def explain(
    source: KVLayout, target: KVLayout, tokens: int, *, allow_unlike_weights: bool = False
) -> list[str]:
    """Lines about handing over a prefix of `tokens` tokens, measured on this machine.

    Raises:
        LayoutMismatch: it cannot be done; names the first reason.
    """
    agreed = plan(source, target, allow_unlike_weights=allow_unlike_weights)
    sample = _Sample(agreed, min(tokens, max(1, SAMPLE_BYTES // target.token_bytes)))
    return [f"{name:<8} {text}" for name, text in _facts(agreed, sample, tokens)]


def _facts(agreed: Plan, sample: _Sample, tokens: int) -> Iterator[tuple[str, str]]:
    lengths = sample.run_lengths()
    more = tokens / sample.tokens
    nbytes = int(lengths.sum() * more)
    yield "plan", agreed.line
    yield "bytes", f"{nbytes:,} for {tokens:,} tokens, {nbytes // tokens:,} each"
    runs = f"{int(len(lengths) * more):,} of {lengths.min():,} to {lengths.max():,} bytes"
    yield "runs", f"{runs} at the target, half of them {int(np.median(lengths)):,} or less"
    how = "from where they lie" if agreed.verbatim else "through a conversion"
    yield "rows", f"{agreed.row_bytes[0]:,} -> {agreed.row_bytes[1]:,} bytes, {how}"
    for name, act in (("write", sample.write), ("send", sample.stage), ("digest", sample.digest)):
        seconds = _least(act) * more
        yield name, f"{seconds * 1e3:,.2f} ms here, {nbytes / seconds / 1e9:.1f} GB/s: {USES[name]}"


USES = {
    "write": "one thread puts it into memory that it can reach",
    "send": "one thread makes it ready to be sent",
    "digest": "one thread sums it up at the sending end",
}


class _Sample:
    """A prefix to try a plan on, in pools that hold little else."""

    def __init__(self, agreed: Plan, tokens: int) -> None:
        ours, theirs = agreed.source, agreed.target
        self.tokens = tokens
        self._layers = theirs.layers
        pools = []
        for layout in (ours, theirs):
            blocks = layout.blocks_for(tokens)
            order = np.argsort(np.arange(blocks) % SPREAD, kind="stable").tolist()
            pools.append((blocks, tuple(order), np.zeros(blocks * layout.block_bytes, np.uint8)))
        (from_blocks, here, memory), (to_blocks, there, target) = pools
        source = Source(ours, memory, from_blocks, here, tokens)
        landing = Landing(
            id="sample",
            epoch=Epoch(0, 0),
            secret=b"",
            worker="",
            endpoints=(),
            layout=theirs,
            pool_blocks=to_blocks,
            blocks=there,
            tokens=tokens,
            lease_seconds=0.0,
        )
        warm_up()
        self._target = Pool.of(theirs, to_blocks, target)
        self._conversion = Conversion(agreed, source, landing)
        self._digest = PrefixDigest(agreed, memory, from_blocks, here, tokens, b"")

    def run_lengths(self) -> np.ndarray:
        """The length of every run of the target."""
        frames = (
            frame.lengths
            for part in whole(self._layers, self.tokens)
            for frame in self._conversion.frames(part)
        )
        return np.concatenate(list(frames))

    def write(self) -> None:
        """Convert straight into the target."""
        for part in whole(self._layers, self.tokens):
            self._conversion.write(part, self._target)

    def stage(self) -> None:
        """Convert into frames."""
        for part in whole(self._layers, self.tokens):
            for _ in self._conversion.frames(part):
                pass

    def digest(self) -> None:
        """Sum up the source."""
        for part in whole(self._layers, self.tokens):
            self._digest.add(part)


def _least(act: Callable[[], None]) -> float:
    """The least seconds that `act` took of a few times."""
    took = []
    for _ in range(4):
        begun = time.perf_counter()
        act()
        took.append(time.perf_counter() - begun)
    return min(took)
