"""Copy what is final from the engine's blocks to the arena: a rank's half, beside its executor.

The executor's thread only puts passes into a queue and asks which blocks are still read; copying,
and waiting for the device, is for a thread of this module's. It is kept waiting only where it would
write over what was not copied yet. Leases run out here, for the executor waits for every rank
without end.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from backends.tensorrt_llm.messages import (
    Arena,
    Blocks,
    Close,
    Closed,
    Exported,
    Message,
    Open,
    Pass,
    Released,
    Step,
    ToRank,
    Voided,
)
from transfer.shared_memory import Segment, attach

PATIENCE_SECONDS = 1.0
"""How long the executor is kept waiting for copies at most; these take milliseconds."""

UNOPENED_SECONDS = 10.0
"""How long blocks of a finished request are kept that the worker has not spoken of."""

MOST_GONE = 65536
"""So many requests are remembered of which a late step is not wanted."""

Work = tuple[Any, Step]
"""An event of the device, and what is final once it is reached."""


class Export(msgspec.Struct):
    """One request whose KV goes to `blocks` of the arena; `done` tokens of it are there."""

    tokens: int
    blocks: Blocks
    lease_seconds: float
    done: int = 0
    busy: bool = False
    closed: bool = False
    void: bool = False

    @property
    def wanted(self) -> bool:
        """Whether what becomes final is still to be copied."""
        return bool(self.blocks) and not self.void and not self.closed

    @property
    def over(self) -> bool:
        """Whether the engine's blocks will not be read again."""
        return not self.busy and (self.void or self.closed or self.done >= self.tokens)


class Exporter:
    """One rank's exports. `say` reaches the worker and returns at once.

    With `one_at_a_time` the executor takes back one request's blocks in a turn and loses those of
    others; all ranks then name their requests in one order.
    """

    def __init__(
        self,
        say: Callable[[Message], None],
        *,
        one_at_a_time: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._say = say
        self._one_at_a_time = one_at_a_time
        self._patience = patience_seconds
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)  # something was copied, or is not wanted
        self._open: dict[int, Export] = {}
        self._early: dict[int, list[Work]] = {}  # what is final of requests not yet opened
        self._gone: dict[int, None] = {}  # requests that are over here, the oldest first
        self._pinned: dict[int, float] = {}  # request -> when it had finished
        self._lost = False
        self._last = 0
        self._work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._uncopied: deque[Step] = deque()  # what is in `_work` or being copied
        self._pool: torch.Tensor | None = None
        self._arena: torch.Tensor | None = None
        self._block_tokens = 1

    def register(self, pool: torch.Tensor, block_tokens: int) -> None:
        """Begin with the engine's pool, [block, layer, plane, bytes]."""
        self._pool, self._block_tokens = pool, block_tokens
        threading.Thread(target=self._copy_all, daemon=True, name="baton-export").start()

    # ---- the executor's thread

    def before_pass(self, told: Pass) -> None:
        """The executor writes to `told.taken` from now on: what is to leave them has to first.

        Blocks that we hold are among them where the executor pins those of an older request with
        the same tokens in their stead. What takes too long to copy, or to be asked for, is lost.
        """
        taken = set(told.taken)
        if told.number <= self._last or not taken:
            return
        with self._lock:
            self._moved.wait_for(lambda: not self._read(taken), self._patience)
            for request in sorted(self._read(taken)):
                export = self._open.get(request)
                if export is None:
                    self._forget(request)
                else:
                    self._void(request, export, "its blocks were another's before they were copied")

    def _read(self, taken: set[int]) -> set[int]:
        """The requests of which something is still to be copied from these blocks."""
        steps = [step for works in self._early.values() for _, step in works]
        for step in self._uncopied:
            export = self._open.get(step.request)
            if export is not None and export.wanted:
                steps.append(step)
        return {step.request for step in steps if not taken.isdisjoint(step.blocks)}

    def after_pass(self, event: Any, told: Pass) -> None:
        """`told` is final once the device has reached `event` (None: it is). Said twice: once."""
        if told.number <= self._last:
            return
        self._last = told.number
        with self._lock:
            for step in told.steps:
                if step.request in self._open:
                    self._put((event, step))
                elif step.request not in self._gone and not self._lost:
                    self._early.setdefault(step.request, []).append((event, step))

    def finished(self, requests: list[int]) -> list[int]:
        """These have finished too. Which of all that have are not read any more: each once."""
        now = time.monotonic()
        with self._lock:
            self._pinned.update(dict.fromkeys(sorted(requests), now))
            free = self._freed(now)
            for request in free:
                del self._pinned[request]
                self._forget(request)
        for request in free:
            self._say(Released(request))
        return free

    def _freed(self, now: float) -> list[int]:
        pinned = list(self._pinned.items())[: 1 if self._one_at_a_time else None]
        return [it for it, since in pinned if self._free(it, now - since)]

    def _put(self, work: Work) -> None:
        """Have it copied. The lock is held."""
        self._uncopied.append(work[1])
        self._work.put(work)

    def _free(self, request: int, seconds: float) -> bool:
        export = self._open.get(request)
        if export is None:
            return request not in self._early or seconds > UNOPENED_SECONDS or self._lost
        if export.over:
            return True
        if seconds <= export.lease_seconds and not self._lost:
            return False
        self._void(request, export, "the lease on its blocks ran out")
        return True

    def _forget(self, request: int) -> None:
        """Its blocks may hold anything from now on. The lock is held."""
        self._early.pop(request, None)
        self._moved.notify_all()
        self._gone[request] = None
        if len(self._gone) > MOST_GONE:
            del self._gone[next(iter(self._gone))]

    # ---- the connection's thread

    def heard(self, message: ToRank | None, files: list[int]) -> None:
        """Do what the worker says; None when it is gone."""
        match message:
            case Arena():
                self._take_arena(message, files)
            case Open():
                self._begin(message)
            case Close(request):
                self._close(request)
            case None:
                with self._lock:
                    self._lost = True
                    self._early.clear()
                    self._moved.notify_all()
                    for request, export in self._open.items():
                        self._void(request, export, "the worker is gone")

    def _begin(self, message: Open) -> None:
        request = message.request
        tokens = message.tokens if message.blocks else 0
        export = Export(tokens, message.blocks, message.lease_seconds)
        with self._lock:
            self._open[request] = export
            if request in self._gone:
                self._void(request, export, "its blocks were given back before it was known")
            for work in self._early.pop(request, ()):
                self._put(work)
            self._moved.notify_all()  # where nothing of it is to be copied, nobody else will

    def _close(self, request: int) -> None:
        with self._lock:
            self._forget(request)
            export = self._open.get(request)
            if export is not None and export.busy:
                export.closed = True
                return
            self._open.pop(request, None)
        self._say(Closed(request))

    def _take_arena(self, arena: Arena, files: list[int]) -> None:
        assert self._pool is not None
        [file] = files
        block_bytes = self._pool[0].numel()
        try:
            memory = attach(Segment(file, arena.offset, arena.blocks * block_bytes))
        finally:
            os.close(file)
        flat = torch.from_numpy(memory)
        if self._pool.is_cuda:
            _pin(flat)
        # Heads lie one after another, and tokens within them.
        cut = (*self._pool.shape[1:3], -1, self._block_tokens, arena.head_bytes)
        self._pool = self._pool.view(len(self._pool), *cut)
        self._arena = flat.view(arena.blocks, *cut)

    # ---- the thread that copies

    def _copy_all(self) -> None:
        stream = None
        if self._pool is not None and self._pool.is_cuda:
            torch.cuda.set_device(self._pool.device)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        while True:
            event, step = self._work.get()
            with self._lock:
                export = self._open.get(step.request)
                if export is None or not export.wanted:
                    self._uncopied.popleft()
                    continue
                export.busy = True
            self._end(step, export, self._export(event, step, export, stream))

    def _export(self, event: Any, step: Step, export: Export, stream: Any) -> str:
        """Copy a step once the device is there. Why that failed; empty when it is done."""
        try:
            if event is not None:
                event.synchronize()
            with torch.cuda.stream(stream):
                self._copy(step, export.blocks)
            if stream is not None:
                stream.synchronize()
        except (RuntimeError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _end(self, step: Step, export: Export, failure: str) -> None:
        with self._lock:
            self._uncopied.popleft()
            self._moved.notify_all()
            export.busy = False
            if failure:
                self._void(step.request, export, failure)
            if export.closed:
                del self._open[step.request]
            elif not export.void:
                export.done = step.end
        if export.closed:
            self._say(Closed(step.request))
        elif not export.void:
            self._say(Exported(step.request, step.end))

    def _void(self, request: int, export: Export, reason: str) -> None:
        if not export.void:
            export.void = True
            self._say(Voided(request, reason))

    def _copy(self, step: Step, blocks: Blocks) -> None:
        """Copy positions `start` to `end` and no other: whole blocks in one piece each."""
        if self._arena is None or self._pool is None:
            raise IndexError("there is no arena yet")
        size = self._block_tokens
        first = step.start // size
        for index, block in zip(itertools.count(first), step.blocks, strict=False):
            begin = max(step.start - index * size, 0)
            end = min(step.end - index * size, size)
            source, target = self._pool[block], self._arena[blocks[index]]
            whole = end - begin == size
            if not whole:  # in strides, for which torch makes a copy between: it must not be early
                source, target = source[..., begin:end, :], target[..., begin:end, :]
            target.copy_(source, non_blocking=whole)


def _pin(memory: torch.Tensor) -> None:
    """Lock memory for the device's copies, which are slower but right without."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
