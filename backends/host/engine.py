"""Host an engine: give it jobs, take its answers, and believe neither its haste nor its silence.

Everything happens on the event loop; the engine's own threads reach it through an `Inbox`. The
engine is called from `run` alone, so that whatever it raises comes out there. Blocks of the arena
stay held until the engine has said that it is through with them: at `imported`, or at `ended`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from math import inf

import structlog

from backends.api import DecodeJob, EngineBackend, Output, PrefillJob, Sampled
from backends.host import inbox
from backends.host.inbox import Inbox
from backends.host.jobs import (
    Given,
    cause,
    decode_job,
    jobs_in_place,
    line_of,
    prefill_job,
)
from backends.host.ledger import Ledger
from backends.host.loop import DeviceHangs, EngineDied, Item, Outcome, Pins, Room, sound
from backends.host.untold import Untold
from backends.host.work import Prefilling, Running
from backends.protocol import RequestSpec

log = structlog.get_logger()


class EngineLoop:
    """The only caller of one engine. `limit` says how many tokens a request may generate."""

    def __init__(
        self,
        backend: EngineBackend,
        ledger: Ledger,
        outcome: Outcome,
        *,
        answer_seconds: float,
        limit: Callable[[RequestSpec], int],
    ) -> None:
        self._backend = backend
        self._info = backend.info
        self._ledger = ledger
        self._outcome = outcome
        self._answer_seconds = answer_seconds
        self._limit = limit
        self._wake = asyncio.Event()
        self._waiting: deque[Prefilling] = deque()
        self._landed: deque[Running] = deque()
        self._computing: set[Prefilling] = set()
        self._running: set[Running] = set()
        self._open: dict[str, Given] = {}
        self._given: dict[Item, list[Given]] = {}
        self._aborts: deque[Given] = deque()
        self._untold = Untold(self._begin_after, outcome.decoded, self._stop, self._lose)
        self._heard_at = 0.0

    # ---- what there is to do

    @property
    def running(self) -> int:
        """Sequences being decoded."""
        return len(self._running)

    @property
    def steps(self) -> int:
        """How many times tokens came."""
        return self._untold.rounds

    @property
    def waiting(self) -> int:
        """Prefixes not yet computed."""
        return len(self._waiting) + len(self._computing)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        return sum(len(work.prefix) - work.done for work in (*self._waiting, *self._computing))

    @property
    def room(self) -> Room:
        """How full the engine's own memory is, as far as it says."""
        held = sum(blocks for _, blocks in self.pins.held)
        blocks = self._info.engine_blocks
        return Room(max(0, blocks - held), blocks)

    @property
    def pins(self) -> Pins:
        """What the engine's jobs hold of its own memory."""
        try:
            held = tuple(self._backend.pins().items())
        except Exception as error:  # foreign code
            return Pins(wrong=(f"pins: {type(error).__name__}: {error}",))
        strays = [f"{count} blocks of {name}" for name, count in held if name not in self._open]
        return Pins(held, tuple(f"the engine holds {it}, which has ended" for it in strays))

    def add_prefill(self, work: Prefilling) -> None:
        """Compute this prefix when there is room for it in the arena."""
        self._waiting.append(work)
        self._wake.set()

    def add_running(
        self,
        sequences: Iterable[Running],
        *,
        ingested: Iterable[int] = (),
        copies: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Decode these: from the arena where they have blocks there, else where they are."""
        for running in sequences:
            self._running.add(running)
            if running.blocks:
                self._landed.append(running)
            else:
                self._take_over(running)
        self._wake.set()

    def end(self, item: Item, release: Callable[[], None]) -> None:
        """Have the engine do no more for `item`; `release` runs when it is through with it."""
        if item.ended:
            return
        item.ended = True
        self._forget(item)
        given = self._given.pop(item, [])
        for one in given:
            self._stop(one)
        if item.busy:
            given[0].release = release
        else:
            release()
        self._wake.set()  # blocks became free, or an abort is due

    def resume(self) -> None:
        """Blocks became free, or a sequence is paused no more."""
        self._wake.set()

    # ---- the loop

    async def run(self) -> None:
        """Have the engine work until cancelled.

        Raises:
            DeviceHangs: it has something to say, and does not.
            EngineDied: it cannot go on.
        """
        loop = asyncio.get_running_loop()
        events = Inbox(loop, self._wake.set)
        self._backend.start(events)
        while True:
            self._wake.clear()
            for event in events.take():
                self._heard_at = loop.time()
                self._hear(event)
            self._untold.tell()
            self._ask(loop.time())
            await self._rest(loop.time())

    async def close(self) -> None:
        """Close the engine, which may take as long as an answer.

        Raises:
            DeviceHangs: it takes longer.
        """
        try:
            async with asyncio.timeout(self._answer_seconds):
                await asyncio.to_thread(self._backend.close)
        except TimeoutError:
            raise DeviceHangs(f"it was not closed in {self._answer_seconds} s") from None

    async def _rest(self, now: float) -> None:
        """Wait for news, as long as the engine may be silent."""
        due = min((it.answer_by for it in self._open.values() if it.answer_by), default=inf)
        if self._open:
            due = min(due, self._heard_at + self._answer_seconds)
        if now >= due:
            late = [it.name for it in self._open.values() if it.answer_by and it.answer_by <= now]
            what = (
                f"did not end {late[:3]}" if late else f"has {len(self._open)} jobs and was silent"
            )
            raise DeviceHangs(f"the engine {what} for {self._answer_seconds} s")
        await asyncio.sleep(0)  # let messages in, however fast it answers
        try:
            async with asyncio.timeout_at(due if due < inf else None):
                await self._wake.wait()
        except TimeoutError:
            return

    # ---- to the engine

    def _ask(self, now: float) -> None:
        """Abort what is wanted no more, then give it what there is room for."""
        while self._aborts:
            self._abort(self._aborts.popleft())
        while self._landed:
            running = self._landed.popleft()
            if not running.ended:
                running.busy = self._give(running, decode_job(running), now)
        while self._waiting and self._seat(self._waiting[0]):
            work = self._waiting.popleft()
            self._computing.add(work)
            work.started = time.monotonic()
            if work.decode_here:
                self._begin_in_place(work, now)
            else:
                work.busy = self._give(work, prefill_job(work), now)
                if work.busy:
                    self._outcome.seated(work)

    def _seat(self, work: Prefilling) -> bool:
        """Have blocks of the arena for a prefix that is to be handed over."""
        if work.push is None:
            return True
        wanted = self._info.layout.blocks_for(len(work.prefix))
        if self._ledger.free < wanted:
            return False
        work.blocks = self._ledger.take(wanted, work.holder)
        return True

    def _begin_in_place(self, work: Prefilling, now: float) -> None:
        for job in jobs_in_place(work, self._limit(work.spec)):
            if not work.ended:  # one that was refused ends them all
                self._give(work, job, now)

    def _give(self, item: Item, job: PrefillJob | DecodeJob, now: float) -> bool:
        """Give the engine a job; False: it does not take it, and the item is lost."""
        layers = self._info.layout.layers
        one = Given(job, item, exported=[0] * layers)
        if not self._open:
            self._heard_at = now  # from now on it must say something
        self._open[job.name] = one
        self._given.setdefault(item, []).append(one)
        try:
            if isinstance(job, PrefillJob):
                self._backend.prefill(job)
            else:
                self._backend.decode(job)
        except Exception as error:  # foreign code: it loses this job and no more
            del self._open[job.name]
            self._given[item].remove(one)
            one.over = True
            self._lose(item, *cause(error))
            return False
        return True

    def _stop(self, one: Given) -> None:
        """Have a job end, if it has not; from now on the engine owes an answer."""
        if one.over or one.answer_by is not None:
            return
        one.answer_by = asyncio.get_running_loop().time() + self._answer_seconds
        if not one.failed:
            self._aborts.append(one)

    def _abort(self, one: Given) -> None:
        if one.over:
            return
        try:
            self._backend.abort(one.name)
        except Exception as error:  # foreign code
            raise EngineDied(f"abort raised {type(error).__name__}: {error}") from error

    # ---- from the engine

    def _hear(self, event: inbox.Event) -> None:
        match event:
            case inbox.Decoded():
                for name, sampled in event.tokens:
                    self._on_decoded(name, sampled)
            case inbox.Died():
                raise EngineDied(event.reason)
            case _:
                one = self._open.get(event.job)
                if one is None or not self._on_event(one, event):
                    log.warning("engine.ignored", job=event.job, event_kind=type(event).__name__)

    def _on_event(self, one: Given, event: inbox.Event) -> bool:
        """Do what an event asks for; False: it makes no sense here."""
        match event, one.item:
            case inbox.Ended(), _:
                self._on_ended(one)
            case inbox.Failed(), _ if not one.failed:
                one.failed = True
                self._on_failed(one, event.error)
            case inbox.Ready(), Prefilling() if isinstance(one.job, PrefillJob):
                if one.prefilled or not one.job.blocks:
                    return False
                self._on_ready(one, one.item, event)
            case inbox.Prefilled(), Prefilling() if not one.prefilled:
                one.prefilled = True
                self._on_prefilled(one, one.item, event)
            case inbox.Imported(), Running() if one.job.blocks and not one.imported:
                one.imported = True
                self._ledger.release(one.item.holder)
            case _:
                return False
        return True

    def _on_ready(self, one: Given, work: Prefilling, event: inbox.Ready) -> None:
        if work.ended:
            return
        wrong = one.export(event.start, event.end, event.layer)
        if wrong:
            self._lose(work, "engine_failed", wrong)
            return
        work.done = min(one.exported)
        layers = range(len(one.exported)) if event.layer is None else (event.layer,)
        for layer in layers:
            self._outcome.layer_ready(work, layer, event.start, event.end)

    def _on_prefilled(self, one: Given, work: Prefilling, event: inbox.Prefilled) -> None:
        if work.ended:
            return
        work.reused = max(0, min(event.cached, len(work.prefix)))
        work.logprobs += event.output.prompt_logprobs
        if isinstance(one.job, DecodeJob):
            return  # in place: told with the first tokens
        wrong = one.objection(event.output, self._info)
        if wrong:
            self._lose(work, "engine_failed", wrong)
            return
        self._prefix_done(work, event.output)

    def _on_decoded(self, name: str, sampled: Sampled) -> None:
        one = self._open.get(name)
        if one is None or isinstance(one.job, PrefillJob):
            log.warning("engine.ignored", job=name, event_kind="Decoded")
            return
        if one.item.ended or one.answer_by is not None:
            return  # said before it heard of the abort
        if not sound(sampled, self._info):
            self._lose(one.item, "engine_failed", f"{sampled!r:.80} is no token")
            return
        one.tokens.append(sampled)
        self._untold.add(one)

    def _on_failed(self, one: Given, error: Exception) -> None:
        one.why = cause(error)
        if not one.tokens:
            self._lose(one.item, *one.why)

    def _on_ended(self, one: Given) -> None:
        """Nothing of it is in the engine any more. What it said before may still be told."""
        del self._open[one.name]
        one.over = True
        one.item.busy = False
        if one.release is not None:
            one.release()
        elif not one.tokens and not (one.prefilled and isinstance(one.job, PrefillJob)):
            self._lose(one.item, *one.why)

    # ---- to the requests

    def _begin_after(self, work: Prefilling) -> None:
        """Go on where it is with a prefix each of whose sequences has a token."""
        given = self._given.get(work, [])
        if work.ended or len(given) < len(work.sequences) or not all(it.tokens for it in given):
            return
        firsts = () if work.bound else tuple(it.tokens.popleft() for it in given)
        self._prefix_done(work, Output(firsts))

    def _prefix_done(self, work: Prefilling, output: Output) -> None:
        wanted = len(work.prefix) - 1 if work.spec.prompt_logprobs is not None else 0
        if len(work.logprobs) != wanted:
            detail = f"{len(work.logprobs)} prompt logprobs, not {wanted}"
            self._lose(work, "engine_failed", detail)
            return
        self._computing.discard(work)
        work.done = len(work.prefix)
        self._outcome.prefilled(work, output)

    def _take_over(self, running: Running) -> None:
        """From now on, what the engine computes in place is this sequence's."""
        assert running.held.prefilling is not None
        mine = self._given[running.held.prefilling]
        one = next(it for it in mine if it.name == line_of(running))
        mine.remove(one)
        one.item = running
        running.busy = not one.over
        self._given[running] = [one]
        self._untold.add(one)

    def _lose(self, item: Item, code: str, detail: str) -> None:
        if not item.ended:
            log.warning("engine.lost", request=item.held.name, code=code, cause=detail)
            self._outcome.lost(item, code, detail)

    def _forget(self, item: Item) -> None:
        if isinstance(item, Running):
            self._running.discard(item)
        elif item in self._computing:
            self._computing.discard(item)
        elif item in self._waiting:
            self._waiting.remove(item)
