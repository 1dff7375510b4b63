"""What each request holds on this worker, from its first message to its last token.

Requests are named by their connection and handle. Whatever ends one (its last token, a cancel,
a lost connection, a failure) comes through `cancel` or `_drop_running`, which give back all.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial

import structlog

from backends.api import Output, Sampled, SteppedBackend
from backends.errors import PoolExhausted, ProtocolError
from backends.host.config import HostConfig
from backends.host.handoff import Pushes, decode_note
from backends.host.janitor import Janitor
from backends.host.landings import Landings, Reserved
from backends.host.ledger import Holder, Ledger
from backends.host.objections import objection
from backends.host.reuse import Reuse
from backends.host.sharing import share_out
from backends.host.steps import Item, StepLoop
from backends.host.work import (
    Prefilling,
    Running,
    deadline_of,
    finish_reason,
    owner,
    sequences_of,
)
from backends.protocol import (
    Cancel,
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
from transfer.errors import LandingGone

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Held:
    """What one request holds here."""

    prefilling: Prefilling | None = None
    landing: str | None = None
    running: dict[int, Running] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing is held any more."""
        return self.prefilling is None and self.landing is None and not self.running


class Requests:
    """All requests of one worker. Call from the event loop only."""

    def __init__(
        self,
        config: HostConfig,
        backend: SteppedBackend,
        ledger: Ledger,
        janitor: Janitor,
        sender: Opener,
        incarnation: int,
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
        load_changed: Callable[[], None],
        cache_changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._backend = backend
        self._info = backend.info
        self._ends = frozenset(backend.info.end_tokens)
        self._ledger = ledger
        self._held: dict[tuple[Link, int], Held] = {}
        self.reuse = Reuse(config.reuse, backend.info, backend.pool, ledger, cache_changed)
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
        self.steps = StepLoop(
            backend,
            ledger,
            self.reuse,
            self,
            step_tokens=config.step_tokens,
            step_timeout=config.step_timeout_seconds,
        )
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
        )

    @property
    def idle(self) -> bool:
        """Whether no request holds anything."""
        return not self._held

    # ---- messages

    def reserve(self, link: Link, message: Reserve) -> None:
        """Answer with a landing, or with why not."""
        spec = message.spec
        detail = self._objection(link, spec, decode=True)
        if detail:
            link.send(Refused(handle=spec.handle, kind="invalid", detail=detail))
            return
        try:
            reserved = self.landings.reserve(
                link,
                spec,
                prefill=message.prefill,
                transport=message.transport,
                partial=message.partial,
            )
        except PoolExhausted as error:
            link.send(Refused(handle=spec.handle, kind="full", detail=str(error)))
        else:
            self._hold(link, spec).landing = reserved.landing.id
            link.send(Granted(handle=spec.handle, landing=reserved.landing))

    def prefill(self, link: Link, message: Prefill) -> None:
        """Compute the prefix when its turn comes; push it while it is computed."""
        spec = message.spec
        detail = self._objection(link, spec, decode=message.decode_here)
        if detail:
            link.send(Refused(handle=spec.handle, kind="invalid", detail=detail))
            return
        if self.steps.waiting >= self._config.max_waiting:
            detail = f"{self.steps.waiting} prefills wait already"
            link.send(Refused(handle=spec.handle, kind="full", detail=detail))
            return
        work = Prefilling(
            link=link,
            spec=spec,
            prefix=spec.prefix,
            holder=Holder("prefill", owner(link, spec)),
            headroom=Holder("headroom", owner(link, spec)),
            decode_here=message.decode_here,
            arrived=time.monotonic(),
            deadline=deadline_of(spec),
            sequences=sequences_of(spec),
        )
        if message.landing is not None:
            work.push = self._pushes.prepare(work, message.landing)
        self._hold(link, spec).prefilling = work
        self.steps.add_prefill(work)

    def flow(self, link: Link, message: Flow) -> None:
        """Pause a sequence or let it go on."""
        held = self._held.get((link, message.handle))
        if held and message.index in held.running:
            held.running[message.index].paused = message.paused
            self.steps.resume()

    def cancel(self, link: Link, message: Cancel) -> None:
        """End a request, or some of its sequences, and give back what it holds."""
        held = self._held.get((link, message.handle))
        if held is None:
            return
        indexes = set(held.running) if message.indexes is None else set(message.indexes)
        for running in [one for index, one in held.running.items() if index in indexes]:
            self._drop_running(running)
        if message.indexes is None:
            if held.prefilling is not None:
                self._drop_prefilling(held.prefilling)
            if held.landing is not None:
                self.landings.withdraw(held.landing)
                held.landing = None
        self._forget_if_empty(link, message.handle)

    def cancel_all(self, link: Link) -> None:
        """The gateway is gone, and with it every right of its requests."""
        for owner_link, handle in list(self._held):
            if owner_link is link:
                self.cancel(link, Cancel(handle=handle))

    def expire(self) -> None:
        """End what has outlived its deadline; its gateway should have, and did not."""
        now = asyncio.get_running_loop().time()
        for (link, handle), held in list(self._held.items()):
            works: list[Item] = [*held.running.values()]
            if held.prefilling is not None:
                works.append(held.prefilling)
            if works and all(now > work.deadline for work in works):
                phase: Phase = "prefill" if held.prefilling is not None else "decode"
                self._fail(link, handle, phase, "deadline", "its deadline passed", retry=False)

    def give_back(self, code: str, detail: str) -> None:
        """End everything here, so that it goes on elsewhere from the tokens that were sent."""
        for (link, handle), held in list(self._held.items()):
            if held.prefilling is not None:
                self._fail(link, handle, "prefill", code, detail)
            elif held.landing is not None:
                self._fail(link, handle, "handoff", code, detail)
            for running in list(held.running.values()):
                self.lost(running, code, detail)

    # ---- what a step gave (`steps.Outcome`)

    def layer_ready(self, work: Prefilling, layer: int, start: int, end: int) -> None:
        """Push a layer of a chunk. The first one opens the handoff."""
        self._pushes.ready(work, KVSlice(layer, start, end))

    def prefilled(self, work: Prefilling, output: Output) -> None:
        """Send the first tokens; then commit, decode on, or end."""
        now = time.monotonic()
        assert work.started is not None
        firsts = tuple(
            self._first(work, sequence_index, sampled)
            for sequence_index, sampled in enumerate(output.sampled)
        )
        work.link.send(
            FirstToken(
                handle=work.spec.handle,
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
            sequence = running.sequence
            sequence.generated.append(sampled.token)
            finish = finish_reason(sequence, sampled.token, running.max_tokens, self._ends)
            frames[running.link].append(
                Token(
                    running.handle,
                    running.index,
                    len(sequence.generated) - 1,
                    sampled.token,
                    finish,
                    sampled.logprob,
                )
            )
            if finish is not None:
                self._drop_running(running)
        for link, rows in frames.items():
            link.send(Tokens(step=self.steps.steps, rows=tuple(rows)))

    def lost(self, item: Item, code: str, detail: str) -> None:
        """A step failed, or the pool ran dry."""
        if isinstance(item, Prefilling):
            self._fail(item.link, item.spec.handle, "prefill", code, detail)
            return
        self._drop_running(item)
        item.link.send(
            Failed(
                handle=item.handle,
                phase="decode",
                code=code,
                detail=detail,
                retry=True,
                indexes=(item.index,),
            )
        )

    # ---- the sending end

    def _push_failed(self, work: Prefilling, code: str, detail: str) -> None:
        self._fail(work.link, work.spec.handle, "handoff", code, detail)

    def _push_closed(self, work: Prefilling) -> None:
        self._drop_prefilling(work)
        self._release_source(work)

    def _drop_prefilling(self, work: Prefilling) -> None:
        """Compute and push no more of `work`; its blocks go when nothing reads them."""
        held = self._held.get((work.link, work.spec.handle))
        if held is not None and held.prefilling is work:
            held.prefilling = None
            self._forget_if_empty(work.link, work.spec.handle)
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
        held = self._hold(reserved.link, spec)
        held.landing = None
        self._ledger.release(reserved.headroom)
        blocks = list(reserved.landing.blocks)
        self._admit(reserved.link, spec, firsts, blocks, reserved.deadline, ingested=True)
        self.reuse.keep(reserved.links, blocks, arrival.proofs)
        self._ledger.release(reserved.holder)
        self._ledger.release(reserved.reused)
        reserved.link.send(Landed(handle=spec.handle, verify=arrival.verify_seconds))
        self._forget_if_empty(reserved.link, spec.handle)

    def _landing_failed(self, reserved: Reserved, code: str, detail: str) -> None:
        log.warning("landing.failed", request=reserved.spec.request, code=code, cause=detail)
        held = self._held.get((reserved.link, reserved.spec.handle))
        if held is not None:
            held.landing = None
        self._fail(reserved.link, reserved.spec.handle, "handoff", code, detail)

    # ---- decoding

    def _decode_here(self, work: Prefilling, firsts: tuple[First, ...]) -> None:
        self._ledger.release(work.headroom)
        self._admit(work.link, work.spec, firsts, work.blocks, work.deadline, ingested=False)
        self._drop_prefilling(work)

    def _admit(
        self,
        link: Link,
        spec: RequestSpec,
        firsts: tuple[First, ...],
        blocks: list[int],
        deadline: float,
        *,
        ingested: bool,
    ) -> None:
        """Decode the sequences that go on after `firsts`."""
        started, copies = share_out(
            self._ledger,
            self._info.layout.block_tokens,
            link,
            spec,
            firsts,
            blocks,
            max_tokens=self._limit(spec),
            deadline=deadline,
        )
        self._hold(link, spec).running.update({one.index: one for one in started})
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
        held = self._held.get((running.link, running.handle))
        if held is not None and held.running.pop(running.index, None) is not None:
            self._forget_if_empty(running.link, running.handle)
        self.steps.end(running, partial(self._release_running, running))

    def _release_running(self, running: Running) -> None:
        self.reuse.keep(self.reuse.links(running.salt, running.computed), running.blocks)
        self._ledger.release(running.holder)
        self.steps.resume()

    # ---- the book of requests

    def _objection(self, link: Link, spec: RequestSpec, *, decode: bool) -> str:
        if (link, spec.handle) in self._held:
            return f"handle: {spec.handle} is in use"
        return objection(spec, self._info, self._config.role, decode=decode)

    def _fail(
        self, link: Link, handle: int, phase: Phase, code: str, detail: str, *, retry: bool = True
    ) -> None:
        self.cancel(link, Cancel(handle=handle))
        link.send(Failed(handle=handle, phase=phase, code=code, detail=detail, retry=retry))

    def _hold(self, link: Link, spec: RequestSpec) -> Held:
        return self._held.setdefault((link, spec.handle), Held())

    def _forget_if_empty(self, link: Link, handle: int) -> None:
        held = self._held.get((link, handle))
        if held is not None and held.empty:
            del self._held[link, handle]
