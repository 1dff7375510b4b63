"""A small engine that is really one: a scheduler in a thread of its own, paged memory of its own.

What it computes is what the synthetic backend computes, so that its text is known and a wrong page
of KV is found out when it is used. Blocks that it gives back are poisoned. When its memory runs dry
it preempts the youngest job and computes that one's context again. It works on a prompt in chunks,
and takes its time to end what was aborted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.api import (
    BackendMisconfigured,
    DecodeJob,
    Events,
    Logprob,
    Output,
    PoolExhausted,
    PrefillJob,
    Row,
    Sequence,
    allocate,
)
from backends.emulation.synthetic import SyntheticBackend
from transfer.layout import KVLayout

POISON = 0xAB
CANONICAL = ("block", "token", "layer", "kv", "head", "dim")
IDLE_SECONDS = 0.005


@dataclass(eq=False)
class Work:
    """A job on the scheduler's desk. `done` tokens of `tokens` have their KV in `blocks`.

    `fresh`: whatever comes from the arena has not been taken yet. `free_at`: it was aborted, and
    keeps its memory until then.
    """

    job: PrefillJob | DecodeJob
    tokens: list[int]
    sequences: tuple[Sequence, ...]
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    exported: int = 0
    scores: list[Logprob] = field(default_factory=list)
    scored: bool = False
    fresh: bool = True
    free_at: float | None = None

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def decodes(self) -> bool:
        return isinstance(self.job, DecodeJob)


class SmallEngine:
    """Options beyond those of the synthetic backend, which it computes with if not with `kernel`:

    `arena_tokens` and `arena_axes` say how the arena is cut; `chunk_tokens` is computed of a prompt
    in one step; of an imported prefix the last `recomputed` tokens are computed again; what was
    aborted keeps its memory for `linger_seconds`.
    """

    def __init__(
        self,
        *,
        arena_tokens: int = 4096,
        arena_axes: str = "block layer kv head token dim",
        chunk_tokens: int = 48,
        recomputed: int = 0,
        linger_seconds: float = 0.0,
        prompt_logprobs: bool = False,
        phases: tuple[str, ...] = ("prefill", "decode"),
        pool_tokens: int = 4096,
        kernel: Any = None,
        progress: object = None,  # it loads nothing
        **options: Any,
    ) -> None:
        if chunk_tokens < 2:
            raise BackendMisconfigured(f"chunk_tokens must be at least 2; got {chunk_tokens}")
        self._kernel = kernel or SyntheticBackend(
            pool_tokens=pool_tokens, verify_kv=True, **options
        )
        inner = self._kernel.info
        layout = msgspec.structs.replace(inner.layout, axes=arena_axes)
        self._chunk_tokens = chunk_tokens
        self._recomputed = recomputed
        self._linger_seconds = linger_seconds
        self.info = msgspec.structs.replace(
            inner,
            layout=layout,
            pool_blocks=arena_tokens // layout.block_tokens,
            kind="engine",
            phases=frozenset(phases),
            prompt_logprobs=prompt_logprobs,
            engine_blocks=inner.pool_blocks,
        )
        self.pool = allocate(layout.block_bytes * self.info.pool_blocks)
        self._arena = canonical(layout, self.pool, self.info.pool_blocks)
        self._memory = canonical(inner.layout, self._kernel.pool, inner.pool_blocks)
        self._free_blocks = list(range(inner.pool_blocks))
        self._memory[:] = poison(self._memory)
        self._orders: queue.SimpleQueue[PrefillJob | DecodeJob | str | None] = queue.SimpleQueue()
        self._waiting: list[Work] = []
        self._active: list[Work] = []
        self._pins: dict[str, int] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.preempted = 0
        self.events: Events

    # ---- the contract

    def start(self, events: Events) -> None:
        self.events = events
        self._thread.start()

    def prefill(self, job: PrefillJob) -> None:
        self._take(job, len(job.tokens))

    def decode(self, job: DecodeJob) -> None:
        self._take(job, len(job.context))

    def abort(self, job: str) -> None:
        self._orders.put(job)

    def pins(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._pins)

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join()
        self._kernel.close()

    def _take(self, job: PrefillJob | DecodeJob, tokens: int) -> None:
        if self.info.layout.blocks_for(tokens + 1) > self.info.engine_blocks:
            raise PoolExhausted(f"{tokens} tokens do not fit")
        self._orders.put(job)

    # ---- the scheduler

    def _run(self) -> None:
        while self._listen():
            self._reap()
            self._admit()
            rows = self._compose()
            if not rows:
                continue
            try:
                outputs = self._step([row for _, row in rows])
            except Exception as error:
                for work, _ in rows:
                    self.events.failed(work.name, error)
                    self._finish(work)
                continue
            self._deliver(rows, outputs)

    def _listen(self) -> bool:
        """Take all orders; wait for one when there is nothing to do. False: stop."""
        busy = any(work.free_at is None for work in self._active)
        while True:
            try:
                order = self._orders.get(block=not busy, timeout=IDLE_SECONDS)
            except queue.Empty:
                return True
            busy = True
            if order is None:
                return False
            if isinstance(order, str):
                self._on_abort(order)
            else:
                self._waiting.append(self._work(order))

    def _work(self, job: PrefillJob | DecodeJob) -> Work:
        if isinstance(job, PrefillJob):
            return Work(job, list(job.tokens), job.sequences)
        sequence = job.sequence
        mine = msgspec.structs.replace(sequence, generated=list(sequence.generated))
        return Work(job, list(job.context), (mine,))

    def _on_abort(self, name: str) -> None:
        for work in [it for it in self._waiting if it.name == name]:
            self._waiting.remove(work)
            self.events.ended(name)
        for work in self._active:
            if work.name == name and work.free_at is None:
                work.free_at = time.monotonic() + self._linger_seconds

    def _reap(self) -> None:
        """Give back what was aborted long enough ago."""
        now = time.monotonic()
        for work in [it for it in self._active if it.free_at is not None and it.free_at <= now]:
            self._finish(work)

    def _admit(self) -> None:
        """Begin with what has room, in the order of arrival."""
        while self._waiting:
            work = self._waiting[0]
            if not self._cover(work, len(work.tokens) + work.decodes):
                return
            self._active.append(self._waiting.pop(0))
            if isinstance(work.job, DecodeJob) and work.job.blocks and work.fresh:
                work.fresh = False
                self._import(work, work.job)

    def _compose(self) -> list[tuple[Work, Row]]:
        rows = []
        for work in list(self._active):
            if work.free_at is not None or work not in self._active:
                continue
            end = min(len(work.tokens), work.done + self._chunk_tokens)
            if len(work.tokens) - end == 1:
                end += 1
            while not self._cover(work, end):
                self._preempt(self._active[-1])
                if work not in self._active:
                    break
            else:
                rows.append((work, self._row(work, end)))
        return [(work, row) for work, row in rows if work in self._active]

    def _row(self, work: Work, end: int) -> Row:
        wanted = None if work.scored else work.job.prompt_logprobs
        return Row(
            tokens=work.tokens[work.done : end],
            start=work.done,
            blocks=work.blocks,
            sequences=work.sequences if end == len(work.tokens) else (),
            prompt_logprobs=wanted,
            following=work.tokens[work.done + 1 : end + 1] if wanted is not None else [],
        )

    def _preempt(self, work: Work) -> None:
        """Take its memory; its context is computed again when there is room."""
        self.preempted += 1
        self._active.remove(work)
        self._release(work)
        work.done, work.scores = 0, []
        if work.free_at is None:
            self._waiting.insert(0, work)
        else:
            self.events.ended(work.name)

    def _step(self, rows: list[Row]) -> list[Output]:
        return self._kernel.step(rows, lambda _row, _layer: None)

    def _deliver(self, rows: list[tuple[Work, Row]], outputs: list[Output]) -> None:
        tokens, over = [], []
        for (work, row), output in zip(rows, outputs, strict=True):
            start, work.done = work.done, row.start + len(row.tokens)
            work.scores += output.prompt_logprobs
            last = work.done == len(work.tokens)
            if isinstance(work.job, PrefillJob):
                self._export(work, work.job, max(start, work.exported))
                if last:
                    self._prefilled(work, output)
                    over.append(work)
            elif last:
                if work.job.prompt_logprobs is not None and not work.scored:
                    self._prefilled(work, Output())
                tokens.append((work.name, output.sampled[0]))
                work.tokens.append(output.sampled[0].token)
                work.sequences[0].generated.append(output.sampled[0].token)
                if len(work.sequences[0].generated) >= work.job.max_tokens:
                    over.append(work)
        if tokens:
            self.events.decoded(tokens)
        for work in over:
            self._finish(work)

    def _prefilled(self, work: Work, output: Output) -> None:
        work.scored = True
        self.events.prefilled(work.name, Output(output.sampled, tuple(work.scores)))

    # ---- memory

    def _cover(self, work: Work, tokens: int) -> bool:
        """Have blocks for so many tokens."""
        wanted = self.info.layout.blocks_for(tokens) - len(work.blocks)
        if wanted > len(self._free_blocks):
            return False
        for _ in range(wanted):
            work.blocks.append(self._free_blocks.pop())
        with self._lock:
            self._pins[work.name] = len(work.blocks)
        return True

    def _release(self, work: Work) -> None:
        self._memory[work.blocks] = poison(self._memory)
        self._free_blocks += work.blocks
        work.blocks = []
        with self._lock:
            self._pins.pop(work.name, None)

    def _finish(self, work: Work) -> None:
        self._active.remove(work)
        self._release(work)
        self.events.ended(work.name)

    # ---- the arena

    def _export(self, work: Work, job: PrefillJob, start: int) -> None:
        if not job.blocks or start >= work.done:
            return
        self._copy(self._memory, work.blocks, self._arena, job.blocks, start, work.done)
        work.exported = work.done
        for layer in range(self.info.layout.layers):
            self.events.ready(work.name, start, work.done, layer)

    def _import(self, work: Work, job: DecodeJob) -> None:
        work.done = max(0, job.imported_tokens - self._recomputed)
        self._copy(self._arena, job.blocks, self._memory, work.blocks, 0, work.done)
        self.events.imported(work.name)

    def _copy(self, source: Any, froms: Any, target: Any, tos: Any, start: int, end: int) -> None:
        positions = np.arange(start, end)
        block, offset = np.divmod(positions, self.info.layout.block_tokens)
        target[np.array(tos)[block], offset] = source[np.array(froms)[block], offset]


def canonical(layout: KVLayout, pool: Any, blocks: int) -> NDArray[Any]:
    """The pool as [block, token, layer, kv, head, dim]."""
    words = layout.axes.split()
    bits: Any = np.uint32 if layout.dtype == "float32" else np.uint16
    shaped = np.frombuffer(pool, bits).reshape(tuple(layout.sizes(blocks).values()))
    return shaped.transpose([words.index(axis) for axis in CANONICAL])


def poison(memory: NDArray[Any]) -> Any:
    """What a number looks like in a block that was given back."""
    return np.frombuffer(bytes([POISON]) * memory.itemsize, memory.dtype)[0]
