"""Run the backend: compose a batch, compute it in the step thread, tell what came of it.

The event loop composes and delivers; the step thread only computes. So blocks, sequences and
the ledger are touched by one thread, and a backend sees them change between steps only.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from backends.api import BackendInfo, Output, Row, Sampled, SteppedBackend
from backends.errors import BackendError, PoolExhausted, StepFailed
from backends.host.ledger import Ledger
from backends.host.loop import DeviceHangs, Item, Outcome, Pins, Room, sound
from backends.host.prefixes import Kept
from backends.host.reuse import Reuse
from backends.host.work import Prefilling, Running

log = structlog.get_logger()


class StepLoop:
    """The only caller of one backend."""

    def __init__(
        self,
        backend: SteppedBackend,
        ledger: Ledger,
        reuse: Reuse,
        outcome: Outcome,
        *,
        step_tokens: int,
        step_timeout: float,
    ) -> None:
        self._backend = backend
        self._info = backend.info
        self._ledger = ledger
        self._reuse = reuse
        self._outcome = outcome
        self._step_tokens = step_tokens
        self._step_timeout = step_timeout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._wake = asyncio.Event()
        self._prefills: deque[Prefilling] = deque()
        self._running: list[Running] = []
        self._turn = 0
        self._ingests: list[int] = []
        self._copies: list[tuple[int, int]] = []
        self._awaiting_copies: list[Running] = []
        self._releases: list[tuple[Item, Callable[[], None]]] = []
        self._closed = False
        self.steps = 0

    # ---- what there is to do

    @property
    def running(self) -> int:
        """Sequences being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Prefixes not yet computed."""
        return len(self._prefills)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        return sum(len(work.prefix) - work.done for work in self._prefills)

    @property
    def room(self) -> Room:
        """How full the pool is."""
        return Room(self._ledger.free, self._ledger.blocks)

    @property
    def pins(self) -> Pins:
        """Nothing: the ledger knows every block."""
        return Pins()

    def add_prefill(self, work: Prefilling) -> None:
        """Compute this prefix when its turn comes."""
        self._prefills.append(work)
        self._wake.set()

    def add_running(
        self,
        sequences: Iterable[Running],
        *,
        ingested: Iterable[int] = (),
        copies: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Decode these from the next step on, after taking note of and copying blocks."""
        new = list(sequences)
        self._running += new
        self._ingests += ingested
        self._copies += copies
        for one in new:
            one.busy = True
        self._awaiting_copies += new
        self._wake.set()

    def end(self, item: Item, release: Callable[[], None]) -> None:
        """Compute no more for `item`; `release` runs now, or when the step that uses it is over."""
        if item.ended:
            return
        item.ended = True
        if isinstance(item, Running):
            self._running.remove(item)
        elif item in self._prefills:
            self._prefills.remove(item)
        if item.busy:
            self._releases.append((item, release))
            self._wake.set()
        else:
            release()
            self._wake.set()  # blocks became free: a waiting prefix may fit

    def resume(self) -> None:
        """Something that was not runnable may be now."""
        self._wake.set()

    # ---- the loop

    async def run(self) -> None:
        """Step while there is something to do, until cancelled.

        Raises:
            DeviceHangs: a step outlasted its time limit.
        """
        try:
            while True:
                items, rows = self._compose()
                if not rows and not self._awaiting_copies:
                    await self._wake.wait()
                    self._wake.clear()
                    continue
                await self._step(items, rows)
                await asyncio.sleep(0)  # let messages in between steps, however fast those are
        finally:
            self._closed = True

    async def close(self) -> None:
        """Wait for the step that may still run, then close the backend.

        Raises:
            DeviceHangs: that step does not return.
        """
        self._closed = True
        try:
            async with asyncio.timeout(self._step_timeout):
                await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        except TimeoutError:
            raise DeviceHangs(f"a step took over {self._step_timeout} s") from None
        self._backend.close()

    async def _step(self, items: list[Item], rows: list[Row]) -> None:
        prepared, self._awaiting_copies = self._awaiting_copies, []
        for item in items:
            item.busy = True
        try:
            outputs = await self._compute(items, rows)
        except BackendError as error:
            outputs, cause = None, str(error)
        self.steps += 1
        used = [*items, *(one for one in prepared if one not in items)]
        self._settle(used)
        if outputs is not None:
            self._deliver(items, rows, outputs)
            return
        for item in used:
            if not item.ended:
                self._outcome.lost(item, "step_failed", cause)
            self._reuse.forget_blocks(item.blocks)  # last: what is lost is kept as it is released

    async def _compute(self, items: list[Item], rows: list[Row]) -> list[Output]:
        """One step in the step thread; whatever the plug-in raises comes out as StepFailed."""
        loop = asyncio.get_running_loop()
        ingests, self._ingests = self._ingests, []
        copies, self._copies = self._copies, []

        def layer_final(index: int, layer: int) -> None:
            item, row = items[index], rows[index]
            if isinstance(item, Prefilling) and item.push is not None and not self._closed:
                end = row.start + len(row.tokens)
                loop.call_soon_threadsafe(self._layer_final, item, layer, row.start, end)

        def step() -> list[Output]:
            try:
                if ingests:
                    self._backend.ingest(ingests)
                if copies:
                    self._backend.copy_blocks(copies)
                outputs = self._backend.step(rows, layer_final) if rows else []
                _check(outputs, rows, self._info)
            except Exception as error:  # foreign code: it loses this batch and no more
                log.exception("step.failed", rows=len(rows))
                raise StepFailed(f"{type(error).__name__}: {error}") from error
            return outputs

        try:
            async with asyncio.timeout(self._step_timeout):
                return await loop.run_in_executor(self._thread, step)
        except TimeoutError:
            raise DeviceHangs(f"a step took over {self._step_timeout} s") from None

    def _settle(self, items: list[Item]) -> None:
        for item in items:
            item.busy = False
        releases, self._releases = self._releases, []
        for item, release in releases:
            if item.busy:
                self._releases.append((item, release))
            else:
                release()

    # ---- before the step

    def _compose(self) -> tuple[list[Item], list[Row]]:
        items: list[Item] = []
        rows: list[Row] = []
        for running in self._next_running():
            if self._grow(running):
                items.append(running)
                rows.append(
                    Row(
                        tokens=running.sequence.generated[-1:],
                        start=running.start,
                        blocks=running.blocks,
                        sequences=(running.sequence,),
                    )
                )
        # A sequence that another's growth preempted must not be computed.
        kept = [(i, r) for i, r in zip(items, rows, strict=True) if not i.ended]
        items, rows = [i for i, _ in kept], [r for _, r in kept]
        budget = max(2, self._step_tokens - len(rows))
        for work in list(self._prefills):
            # A chunk of one token would be computed as a decode row, which may round otherwise.
            if budget < 2 or len(rows) >= self._info.max_batch or not self._seat(work):
                break
            if work.checking:
                continue
            row = self._chunk(work, budget)
            budget -= len(row.tokens)
            items.append(work)
            rows.append(row)
        return items, rows

    def _next_running(self) -> list[Running]:
        ready = [one for one in self._running if not one.paused]
        limit = self._info.max_batch
        if len(ready) <= limit:
            return ready
        self._turn = (self._turn + limit) % len(ready)
        return (ready[self._turn :] + ready[: self._turn])[:limit]

    def _grow(self, running: Running) -> bool:
        """Have a block for the position to be computed, at another sequence's cost if need be."""
        if running.ended:
            return False
        while running.start // self._info.layout.block_tokens >= len(running.blocks):
            try:
                running.blocks += self._ledger.take(1, running.holder)
            except PoolExhausted:
                victim = max(self._running, key=_slack)
                self._outcome.lost(victim, "preempted", "the pool ran dry")
                if victim is running:
                    return False
                if victim.busy:  # its blocks come free after the next step
                    return False
        return True

    def _seat(self, work: Prefilling) -> bool:
        """Have blocks for the whole prefix, and for the sequences to grow when they stay here.

        Those that are kept of its beginning are shared. At least two tokens are computed: the last
        one gives the logits, and one alone would look like a decode row.
        """
        if work.blocks:
            return True
        if work.links is None:
            work.links = self._reuse.links(work.spec.salt, work.prefix)
        layout = self._info.layout
        most = (len(work.prefix) - 2) // layout.block_tokens
        if work.spec.prompt_logprobs is not None:
            most = 0  # they need every token's logits
        kept = self._reuse.share(work.links, most, work.holder)
        spare = len(work.spec.sequences) if work.decode_here else 0
        wanted = layout.blocks_for(len(work.prefix)) - len(kept)
        if self._ledger.free < wanted + spare:
            self._ledger.release(work.holder)
            return False
        work.blocks = [it.block for it in kept] + self._ledger.take(wanted, work.holder)
        self._ledger.take(spare, work.headroom)
        if kept:
            work.checking = True
            self._reuse.check(kept, partial(self._begin_after, work, kept))
        return True

    def _begin_after(self, work: Prefilling, kept: list[Kept], right: bool) -> None:
        """Go on after what was kept, if it is as it was, else from the beginning."""
        work.checking = False
        if work.ended or self._closed:
            return
        if right:
            work.done = work.reused = len(kept) * self._info.layout.block_tokens
            if work.push is not None:
                for layer in range(self._info.layout.layers):
                    self._outcome.layer_ready(work, layer, 0, work.done)
        else:
            self._ledger.release(work.holder)
            self._ledger.release(work.headroom)
            work.blocks = []
        self._wake.set()

    def _chunk(self, work: Prefilling, budget: int) -> Row:
        if work.started is None:
            work.started = time.monotonic()
            self._outcome.seated(work)
        end = min(len(work.prefix), work.done + budget)
        if len(work.prefix) - end == 1:
            end += 1  # nor may the last chunk be of one token
        last = end == len(work.prefix)
        wants = work.spec.prompt_logprobs
        return Row(
            tokens=work.prefix[work.done : end],
            start=work.done,
            blocks=work.blocks,
            sequences=work.sequences if last and not work.bound else (),
            prompt_logprobs=wants,
            following=work.prefix[work.done + 1 : end + 1] if wants is not None else [],
        )

    # ---- after the step

    def _layer_final(self, work: Prefilling, layer: int, start: int, end: int) -> None:
        if not work.ended and not self._closed:
            work.reported.add(layer)
            self._outcome.layer_ready(work, layer, start, end)

    def _deliver(self, items: list[Item], rows: list[Row], outputs: list[Output]) -> None:
        decoded: list[tuple[Running, Sampled]] = []
        for item, row, output in zip(items, rows, outputs, strict=True):
            if item.ended:
                continue
            if isinstance(item, Running):
                decoded.append((item, output.sampled[0]))
            else:
                self._advance(item, row, output)
        if decoded:
            self._outcome.decoded(decoded)

    def _advance(self, work: Prefilling, row: Row, output: Output) -> None:
        end = row.start + len(row.tokens)
        if work.push is not None:
            for layer in range(self._info.layout.layers):
                if layer not in work.reported:
                    self._outcome.layer_ready(work, layer, row.start, end)
            work.reported.clear()
        work.logprobs += output.prompt_logprobs
        work.done = end
        full = end // self._info.layout.block_tokens
        self._reuse.keep((work.links or [])[:full], work.blocks)
        if end == len(work.prefix):
            self._prefills.remove(work)
            self._outcome.prefilled(work, output)


def _slack(running: Running) -> tuple[bool, float]:
    """Who is preempted first: what nobody owns, then what has most time left."""
    return running.held.link is None, running.deadline


def _check(outputs: list[Output], rows: list[Row], info: BackendInfo) -> None:
    """Refuse what a plug-in must not answer, while only its batch is lost by that."""
    if len(outputs) != len(rows):
        raise StepFailed(f"{len(outputs)} outputs for {len(rows)} rows")
    for number, (output, row) in enumerate(zip(outputs, rows, strict=True)):
        if len(output.sampled) != len(row.sequences):
            raise StepFailed(
                f"row {number}: {len(output.sampled)} tokens for {len(row.sequences)} sequences"
            )
        for sampled in output.sampled:
            if not sound(sampled, info):
                raise StepFailed(f"row {number}: {sampled!r:.80} is no token")
