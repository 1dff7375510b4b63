"""What each request holds on this worker, from its first message to its last token.

Requests are named by their connection and handle (`book.py`). Whatever ends one (its last token,
a cancel, a lost connection, a failure) comes through `_end` or `_drop_running`, which give back
all; the tokens of some are kept beyond that (`keeping.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable
from functools import partial

import structlog

from backends.api import Backend, Output, Sampled
from backends.errors import PoolExhausted, ProtocolError
from backends.host.book import Book
from backends.host.config import HostConfig
from backends.host.handoff import Pushes, decode_note
from backends.host.hosting import loop_of
from backends.host.janitor import Janitor
from backends.host.keeping import Keeper
from backends.host.landings import Landings
from backends.host.ledger import Ledger
from backends.host.loop import Item
from backends.host.objections import objection
from backends.host.reserved import Reserved
from backends.host.reuse import Reuse
from backends.host.sharing import share_out
from backends.host.work import Held, Prefilling, Running, finish_reason, given_up
from backends.protocol import (
    Adopt,
    Cancel,
    Disown,
    Failed,
    First,
    FirstToken,
    Flow,
    Granted,
    Landed,
    Link,
    Phase,
    Prefill,
    Refused,
    RequestSpec,
    Reserve,
    Token,
    Tokens,
)
from transfer.contract import Arrival, KVSlice, Opener
from transfer.errors import LandingGone, LayoutMismatch

log = structlog.get_logger()

ForRequests = Reserve | Prefill | Cancel | Flow | Disown | Adopt


class Requests:
    """All requests of one worker. Call from the event loop only."""

    def __init__(
        self,
        config: HostConfig,
        backend: Backend,
        ledger: Ledger,
        janitor: Janitor,
        sender: Opener,
        incarnation: int,
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
        load_changed: Callable[[], None],
        cache_changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._info = backend.info
        self._ends = frozenset(backend.info.end_tokens)
        self._ledger = ledger
        self._book = Book()
        self.reuse = Reuse(config.keeping, backend.info, backend.pool, ledger, cache_changed)
        self._pushes = Pushes(
            sender,
            backend.pool,
            backend.info,
            janitor,
            spawn,
            commit_seconds=config.commit_timeout_seconds,
            failed=self._push_failed,
            closed=self._push_closed,
        )
        self.steps = loop_of(config, backend, ledger, self.reuse, self, self._limit)
        self.landings = Landings(
            config,
            self._info,
            backend.pool,
            ledger,
            self.reuse,
            janitor,
            incarnation,
            admit=self._admit_arrival,
            failed=self._landing_failed,
            freed=self.steps.resume,
            shunned=load_changed,
            reclaim=lambda: self.keeper.reclaim(),
        )
        self.keeper = Keeper(config, self._book, self._stop, self._end, self.steps.resume)

    @property
    def idle(self) -> bool:
        """Whether no request holds anything."""
        return not len(self._book)

    @property
    def quiet(self) -> bool:
        """Whether nothing is computed or moved any more; tokens may still be kept."""
        return all(held.idle for held in self._book)

    # ---- messages

    def hear(self, link: Link, message: ForRequests) -> None:
        """Do what a gateway asks for."""
        match message:
            case Reserve():
                self._reserve(link, message)
            case Prefill():
                self._prefill(link, message)
            case Adopt():
                self.keeper.adopt(link, message)
            case _ if (held := self._book.get(link, message.handle)) is not None:
                self._change(held, message)

    def _change(self, held: Held, message: Cancel | Flow | Disown) -> None:
        match message:
            case Flow() if message.index in held.running:
                held.running[message.index].paused = message.paused
                self.steps.resume()
            case Disown():
                self.keeper.disown(held)
            case Cancel(indexes=None):
                self.keeper.give_up(held)
            case Cancel(indexes=(*indexes,)):
                self._stop(held, indexes)
                if held.claim and held.tracks.keys() <= set(indexes):
                    self._end(held)

    def _reserve(self, link: Link, message: Reserve) -> None:
        """Answer with a landing, or with why not."""
        spec = message.spec
        if self._refused(link, spec, prefill=False, decode=True):
            return
        held = self._book.open(link, spec)
        try:
            reserved = self.landings.reserve(
                held,
                spec,
                prefill=message.prefill,
                transport=message.transport,
                partial=message.partial,
                sources=message.sources,
            )
        except PoolExhausted as error:
            self._book.close(held)
            link.send(Refused(handle=spec.handle, kind="full", detail=str(error)))
        except LayoutMismatch as error:
            self._book.close(held)
            link.send(Refused(handle=spec.handle, kind="invalid", detail=str(error)))
        else:
            held.landing = reserved.landing.id
            link.send(Granted(handle=spec.handle, landing=reserved.landing))

    def _prefill(self, link: Link, message: Prefill) -> None:
        """Compute the prefix when its turn comes; push it while it is computed."""
        spec = message.spec
        if self._refused(link, spec, prefill=True, decode=message.decode_here):
            return
        if self.steps.waiting >= self._config.max_waiting:
            detail = f"{self.steps.waiting} prefills wait already"
            link.send(Refused(handle=spec.handle, kind="full", detail=detail))
            return
        held = self._book.open(link, spec)
        work = held.prefilling = Prefilling.of(held, spec, decode_here=message.decode_here)
        if message.landing is not None:
            work.push = self._pushes.prepare(work, message.landing)
        self.steps.add_prefill(work)

    def lose(self, link: Link) -> None:
        """The gateway is gone, and with it every right of its requests but to be adopted."""
        for held in self._book.of(link):
            self.keeper.disown(held)

    def expire(self) -> None:
        """End what has outlived its deadline, which its gateway should have done, or its lease."""
        self.keeper.sweep()
        now = asyncio.get_running_loop().time()
        for held in self._book:
            computing = held.prefilling is not None or held.running
            if computing and now > held.deadline:
                phase: Phase = "prefill" if held.prefilling is not None else "decode"
                self._fail(held, phase, "deadline", "its deadline passed", retry=False)
            if held.claim and now > held.deadline:
                self.keeper.give_up(held)

    def give_back(self, code: str, detail: str) -> None:
        """End everything here, so that it goes on elsewhere from the tokens that were sent."""
        for held in self._book:
            if held.link is None:
                self.keeper.give_up(held)
            elif held.prefilling is not None:
                self._fail(held, "prefill", code, detail)
            elif held.landing is not None:
                self._fail(held, "handoff", code, detail)
            for running in list(held.running.values()):
                self.lost(running, code, detail)

    # ---- what was computed (`loop.Outcome`)

    def seated(self, work: Prefilling) -> None:
        """Open the handoff while the first chunk is computed."""
        if work.push is not None:
            self._pushes.begin(work)

    def layer_ready(self, work: Prefilling, layer: int, start: int, end: int) -> None:
        """Push a layer of a chunk."""
        self._pushes.ready(work, KVSlice(layer, start, end))

    def prefilled(self, work: Prefilling, output: Output) -> None:
        """Send the first tokens; then commit, decode on, or end."""
        now = time.monotonic()
        assert work.started is not None
        firsts = tuple(
            self._first(work, sequence_index, sampled)
            for sequence_index, sampled in enumerate(output.sampled)
        )
        work.held.note(firsts)
        work.held.tell(
            FirstToken(
                handle=work.held.handle,
                first=firsts,
                wait=work.started - work.arrived,
                prefill=now - work.started,
                prompt_logprobs=tuple(work.logprobs),
                cached=work.reused,
            )
        )
        over = bool(firsts) and all(first.finish for first in firsts)
        if work.push is not None and not over:
            work.push.finish(firsts)
        elif work.decode_here and not over:
            self._decode_here(work, firsts)
        else:
            self._drop_prefilling(work)

    def decoded(self, results: list[tuple[Running, Sampled]]) -> None:
        """One frame per gateway with all that this step gave; ended sequences give back."""
        frames: dict[Link, list[Token]] = defaultdict(list)
        for running, sampled in results:
            sequence, held = running.sequence, running.held
            sequence.generated.append(sampled.token)
            finish = finish_reason(sequence, sampled.token, running.max_tokens, self._ends)
            if held.claim:
                held.tracks[running.index].add(sampled.token, finish, sampled.logprob)
            if held.link is not None:
                position = len(sequence.generated) - 1
                row = (held.handle, running.index, position, sampled.token, finish, sampled.logprob)
                frames[held.link].append(Token(*row))
            if finish is not None:
                self._drop_running(running)
        for link, rows in frames.items():
            link.send(Tokens(step=self.steps.steps, rows=tuple(rows)))

    def lost(self, item: Item, code: str, detail: str) -> None:
        """A step failed, or the pool ran dry."""
        held = item.held
        if isinstance(item, Prefilling):
            self._fail(held, "prefill", code, detail)
            return
        if held.claim:
            held.tracks[item.index].lost = True
        self._drop_running(item)
        held.tell(given_up(held.handle, (item.index,), code, detail))

    # ---- the sending end

    def _push_failed(self, work: Prefilling, code: str, detail: str) -> None:
        self._fail(work.held, "handoff", code, detail)

    def _push_closed(self, work: Prefilling) -> None:
        handed_over = work.held.prefilling is work
        self._drop_prefilling(work)
        self._release_source(work)
        if handed_over:
            self._book.close(work.held)  # the decode worker has all that is kept

    def _drop_prefilling(self, work: Prefilling) -> None:
        """Compute and push no more of `work`; its blocks go when nothing reads them."""
        if work.held.prefilling is work:
            work.held.prefilling = None
            self._close_if_over(work.held)
        self._pushes.cancel(work)
        self.steps.end(work, partial(self._release_source, work))

    def _release_source(self, work: Prefilling) -> None:
        if work.ended and not work.busy and work not in self._pushes:
            self._ledger.release(work.holder)
            self._ledger.release(work.headroom)
            self.steps.resume()

    # ---- the receiving end

    def _admit_arrival(self, reserved: Reserved, arrival: Arrival) -> None:
        spec = reserved.spec
        try:
            firsts = decode_note(arrival.note)
        except ProtocolError as error:
            raise LandingGone(f"the note of the handoff is unreadable: {error}") from error
        known = {first.index for first in firsts}
        if not all(one.generated or one.index in known for one in spec.sequences):
            raise LandingGone("the note of the handoff lacks a first token")
        held = reserved.held
        held.landing = None
        held.note(firsts)
        self._ledger.release(reserved.headroom)
        blocks = list(reserved.blocks)
        self._admit(held, spec, firsts, blocks, ingested=True)
        self.reuse.keep(reserved.links, blocks, arrival.proofs)
        self._ledger.release(reserved.holder)
        self._ledger.release(reserved.reused)
        held.tell(Landed(handle=held.handle, verify=arrival.verify_seconds))
        if held.epoch != held.born:  # its owner came late and may not know the first tokens
            self.keeper.tell(held)
        self._close_if_over(held)

    def _landing_failed(self, reserved: Reserved, code: str, detail: str) -> None:
        log.warning("landing.failed", request=reserved.spec.request, code=code, cause=detail)
        reserved.held.landing = None
        self._fail(reserved.held, "handoff", code, detail)

    # ---- decoding

    def _decode_here(self, work: Prefilling, firsts: tuple[First, ...]) -> None:
        self._ledger.release(work.headroom)
        self._admit(work.held, work.spec, firsts, work.blocks, ingested=False)
        self._drop_prefilling(work)

    def _admit(
        self,
        held: Held,
        spec: RequestSpec,
        firsts: tuple[First, ...],
        blocks: list[int],
        *,
        ingested: bool,
    ) -> None:
        """Decode the sequences that go on after `firsts`."""
        started, copies = share_out(
            self._ledger,
            self._info.layout.block_tokens,
            held,
            spec,
            firsts,
            blocks,
            max_tokens=self._limit(spec),
            deadline=held.deadline,
            written=self._info.kind == "stepped",
        )
        held.running.update({one.index: one for one in started})
        self.steps.add_running(started, ingested=blocks if ingested else (), copies=copies)

    def _limit(self, spec: RequestSpec) -> int:
        """How many tokens may be generated: as many as were asked for and the context has."""
        return min(spec.max_tokens, self._info.context_tokens + 1 - len(spec.prompt))

    def _first(self, work: Prefilling, order: int, sampled: Sampled) -> First:
        sequence = work.sequences[order]
        sequence.generated.append(sampled.token)
        finish = finish_reason(sequence, sampled.token, self._limit(work.spec), self._ends)
        index = work.spec.sequences[order].index
        return First(index, sampled.token, finish, sampled.logprob)

    def _drop_running(self, running: Running) -> None:
        if running.held.running.pop(running.index, None) is not None:
            self._close_if_over(running.held)
        self.steps.end(running, partial(self._release_running, running))

    def _release_running(self, running: Running) -> None:
        self.reuse.keep(self.reuse.links(running.salt, running.computed), running.blocks)
        self._ledger.release(running.holder)
        self.steps.resume()

    # ---- the book of requests

    def _refused(self, link: Link, spec: RequestSpec, *, prefill: bool, decode: bool) -> bool:
        """Whether it can never run here, or is not this gateway's any more; says so."""
        role = self._config.role
        detail = objection(spec, self._info, role, prefill=prefill, decode=decode)
        if self._book.get(link, spec.handle) is not None:
            detail = f"handle: {spec.handle} is in use"
        if detail:
            link.send(Refused(handle=spec.handle, kind="invalid", detail=detail))
            return True
        return self.keeper.fenced(link, spec)

    def _stop(self, held: Held, indexes: Iterable[int]) -> None:
        """Decode these sequences no more."""
        for index in indexes:
            if index in held.running:
                self._drop_running(held.running[index])

    def _end(self, held: Held) -> None:
        """Give back all that a request holds, now or when the step that uses it is over."""
        self._stop(held, tuple(held.running))
        if held.prefilling is not None:
            self._drop_prefilling(held.prefilling)
        if held.landing is not None:
            self.landings.withdraw(held.landing)
            held.landing = None
        self._close_if_over(held)

    def _fail(
        self, held: Held, phase: Phase, code: str, detail: str, *, retry: bool = True
    ) -> None:
        handle = held.handle
        failed = Failed(handle=handle, phase=phase, code=code, detail=detail, retry=retry)
        held.failure = failed
        self._end(held)
        held.tell(failed)
        if held.link is None and not held.tokens:
            self._book.close(held)  # there is nothing to adopt

    def _close_if_over(self, held: Held) -> None:
        if held.idle and not held.claim:
            self._book.close(held)
