"""A host in a few lines: gives out blocks, cuts prompts into rows, steps in a thread of its own.

As in a worker, the plug-in is made in one thread and computes in another, always the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.api import Output, Ready, Row, Sampled, Sampling, Sequence, SteppedBackend
from backends.host.pools import pools_of
from backends.testing.form import Broken, Hangs
from backends.testing.memory import cells
from transfer.layout import KVLayout
from transfer.pool import Pool

T = TypeVar("T")

GREEDY = Sampling(temperature=0.0)
PATIENCE_SECONDS = 120.0
"""What one call may take before it counts as hung, as a worker's `step_timeout_seconds`."""

Bytes = NDArray[np.uint8]


class Caller(Protocol):
    """Whoever calls a backend for a desk."""

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises."""

    def close(self) -> None:
        """Nothing more is to be called."""


class StepThread:
    """Runs calls one after the other in one thread, which is left behind if it never returns."""

    def __init__(self, patience: float) -> None:
        """Start the thread. A call that takes longer than `patience` seconds counts as hung."""
        self._patience = patience
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises there.

        Raises:
            Hangs: it does neither in time.
        """
        future: Future[T] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        try:
            return future.result(self._patience)
        except TimeoutError:
            if future.done():
                raise
            name = getattr(function, "__name__", "a call")
            raise Hangs(f"{name} did not return within {self._patience:g} s") from None

    def close(self) -> None:
        """End the thread, which has nothing to do."""
        self._calls.put(None)
        self._thread.join(self._patience)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:  # it comes out in the caller's thread
                future.set_exception(error)


class Line:
    """One sequence and the blocks that hold its KV."""

    def __init__(self, prompt: Iterable[int], sampling: Sampling = GREEDY, seed: int = 0) -> None:
        """Nothing is computed yet."""
        self.sequence = Sequence(prompt=list(prompt), generated=[], sampling=sampling, seed=seed)
        self.blocks: list[int] = []
        self.sampled: list[Sampled] = []

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was generated."""
        return [*self.sequence.prompt, *self.sequence.generated]

    @property
    def generated(self) -> list[int]:
        """What was generated."""
        return self.sequence.generated

    def take(self, sampled: Sampled, forced: int | None = None) -> None:
        """Go on with what was sampled, or with the token `forced`."""
        self.sampled.append(sampled)
        self.sequence.generated.append(sampled.token if forced is None else forced)


def nobody(_row: int, _layer: int) -> None:
    """A `Ready` for whom nothing is pushed."""


class Desk:
    """One backend, and the free blocks of its pool in a shuffled order."""

    def __init__(
        self,
        backend: SteppedBackend,
        seed: int = 0,
        patience: float = PATIENCE_SECONDS,
        thread: Caller | None = None,
    ) -> None:
        """All blocks are free. The backend is called in a thread of its own, or by `thread`."""
        self.backend, self.info = backend, backend.info
        self.layout: KVLayout = backend.info.layout
        self.thread: Caller = thread or StepThread(patience)
        order = np.random.default_rng(seed).permutation(self.info.pool_blocks)
        self.free: list[int] = order.tolist()

    def clear(self) -> None:
        """Every block is free again."""
        self.free = np.random.default_rng(1).permutation(self.info.pool_blocks).tolist()

    def close(self) -> None:
        """Give the device back, as a worker does: when its step thread has ended."""
        self.thread.close()
        self.backend.close()

    # ---- blocks

    def cover(self, line: Line, tokens: int) -> None:
        """Give the line blocks for this many tokens."""
        for _ in range(self.layout.blocks_for(tokens) - len(line.blocks)):
            if not self.free:
                raise RuntimeError(f"the kit needs more than {self.info.pool_blocks} blocks")
            line.blocks.append(self.free.pop())

    def release(self, *lines: Line) -> None:
        """Take the blocks of lines back; whoever comes next gets them first."""
        for line in lines:
            self.free.extend(line.blocks)
            line.blocks = []

    @property
    def pools(self) -> list[Pool]:
        """Where each of its pools lies."""
        return [
            Pool.of(it.layout, self.info.pool_blocks, it.memory)
            for it in pools_of(self.info, self.backend.pool)
        ]

    @property
    def writable(self) -> bool:
        """Whether others can write to its pools."""
        return all(pool.writable for pool in self.pools)

    def snapshot(self) -> list[Bytes]:
        """A copy of every array of every pool, as [block, layer, token, byte]."""
        return [array for pool in self.pools for array in cells(pool)]

    # ---- steps

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

    def decode_row(self, line: Line) -> Row:
        """The newest token of a line."""
        return self.row(line, len(line.tokens) - 1, len(line.tokens))

    def step(self, rows: Items[Row], ready: Ready = nobody) -> list[Output]:
        """One step in the step thread. What comes back has the right shape.

        Raises:
            Broken: it has not.
        """
        outputs = self.thread.call(self.backend.step, rows, ready)
        if len(outputs) != len(rows):
            raise Broken(f"step: {len(outputs)} outputs for {len(rows)} rows; give one for each")
        for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            if len(output.sampled) != len(row.sequences):
                raise Broken(
                    f"step: {len(output.sampled)} tokens for the {len(row.sequences)} sequences "
                    f"of row {number}; sample one for each, and none where there is none"
                )
            for sampled in output.sampled:
                if type(sampled.token) is not int:
                    kind = type(sampled.token).__name__
                    raise Broken(f"step: a token is a {kind}; make it a Python int")
        return outputs

    def prefill(self, line: Line, chunk: int = 1 << 20, *, ready: Ready = nobody) -> Output:
        """Compute the whole line in chunks, and take its next token."""
        total = len(line.tokens)
        starts = range(0, total, chunk)
        output = Output()
        for start in starts:
            (output,) = self.step([self.row(line, start, min(start + chunk, total))], ready)
        line.take(output.sampled[0])
        return output

    def decode(self, lines: Items[Line], steps: int) -> None:
        """Take `steps` more tokens on every line, all lines in one batch."""
        for _ in range(steps):
            rows = [self.decode_row(line) for line in lines]
            for line, output in zip(lines, self.step(rows), strict=True):
                line.take(output.sampled[0])

    def force(self, line: Line, tokens: Items[int]) -> None:
        """Decode on with these tokens, whatever is sampled; the first replaces the newest."""
        line.sequence.generated[-1] = tokens[0]
        for token in [*tokens[1:], None]:
            (output,) = self.step([self.decode_row(line)])
            line.take(output.sampled[0], token)

    def run(
        self,
        prompt: Iterable[int],
        steps: int,
        *,
        chunk: int = 1 << 20,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[Sampled]:
        """Continue one prompt alone; its blocks are free afterwards."""
        line = Line(prompt, sampling, seed)
        self.prefill(line, chunk)
        self.decode([line], steps - 1)
        self.release(line)
        return line.sampled

    def ingest(self, blocks: Items[int]) -> None:
        """As the host calls it."""
        self.thread.call(self.backend.ingest, list(blocks))

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """As the host calls it."""
        self.thread.call(self.backend.copy_blocks, list(pairs))
