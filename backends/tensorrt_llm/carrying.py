"""One prefill job after another through the engine: from its prompt to its last free block.

    submitted -> seated -> exported chunk by chunk -> answered, finished -> prefilled
              -> closed (no rank writes to the arena) -> released (its memory is free) -> ended

The answer says nothing of the KV: a job is prefilled when every rank has exported all of it *and*
the scheduler was told that the request is finished. A request that was cancelled may never be told
of, and an executor without work asks no rank what it has released; a request that nobody wants then
has it make a turn (`turns.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import defaultdict, deque
from typing import Any

import structlog

from backends.api import Events, Output, PrefillJob, Sampled, Sequence
from backends.errors import BackendError, StepFailed
from backends.tensorrt_llm.carried import Aborted, Carried, EngineDied
from backends.tensorrt_llm.desk import Desk
from backends.tensorrt_llm.library import Library
from backends.tensorrt_llm.messages import (
    Close,
    Closed,
    Exported,
    Finished,
    FromRank,
    Open,
    Released,
    Seated,
    Voided,
)
from backends.tensorrt_llm.scheduling import GLOBAL_ID, TURN_ID, TURN_TOKENS, digest_of
from backends.tensorrt_llm.turns import Turns

log = structlog.get_logger()

TURN = "turn"
TURN_SECONDS = 0.02
"""How long the engine is left to make a turn by itself."""

LOOK_SECONDS = 1.0
"""How often it is looked whether a request without an answer was cancelled."""

MOST_FREED = 4096
"""So many requests are remembered that a rank has released before the scheduler spoke of them."""


class Carrier:
    """All jobs of one engine. Everything runs on one event loop; `pins` may be read elsewhere."""

    def __init__(
        self,
        library: Library,
        desk: Desk,
        events: Events,
        *,
        ranks: tuple[int, ...],
        exporting: tuple[int, ...],
        lease_seconds: float,
    ) -> None:
        self._library, self._desk, self._events = library, desk, events
        self._ranks, self._exporting = ranks, exporting
        self._lease = lease_seconds
        self._numbers, self._turn_numbers = itertools.count(GLOBAL_ID), itertools.count(TURN_ID)
        self._jobs: dict[str, Carried] = {}
        self._requests: dict[int, Carried] = {}
        self._unmatched: dict[bytes, deque[Carried]] = defaultdict(deque)
        self._freed: dict[int, set[int]] = {}  # ranks that released what is not yet known
        self._turns = Turns(self._turn)
        self.pins: dict[str, int] = {}

    # ---- the host

    def abort(self, name: str) -> None:
        """Do no more for a job; nothing happens to one that there is not."""
        it = self._jobs.get(name)
        if it is not None:
            it.aborted = True
            for result in it.results:
                self._cancel(result)
            it.change()

    def take(self, job: PrefillJob) -> Carried:
        """Enter a job, so that it can be aborted; `carry` does it."""
        it = self._jobs[job.name] = Carried(job.name, job)
        return it

    async def carry(self, it: Carried) -> None:
        """Do a job to its end.

        Raises:
            EngineDied: the engine cannot go on.
        """
        try:
            await self._compute(it)
        except Aborted:
            log.debug("prefill.aborted", job=it.name)
        except BackendError as error:
            self._events.failed(it.name, error)
        await self._vacate(it)
        del self._jobs[it.name]
        self.pins.pop(it.name, None)
        self._events.ended(it.name)

    # ---- one job

    async def _compute(self, it: Carried) -> None:
        job = it.job
        assert job is not None
        it.check()
        if job.tokens == TURN_TOKENS and not self._library.can.own_ids:
            raise StepFailed("this release of TensorRT-LLM would take the prompt for one of ours")
        first = job.sequences[0] if job.sequences else None
        result = self._submit(it, job.tokens, first, self._salt(it))
        tokens = [await self._answer(it, result)]
        tokens += [await self._sibling(it, job.tokens, other) for other in job.sequences[1:]]
        if it.request is None:
            await self._seat(it)
        await self._commit(it, job)
        sampled = tuple(Sampled(token) for token in tokens[: len(job.sequences)])
        self._events.prefilled(it.name, Output(sampled), it.reused)

    async def _seat(self, it: Carried) -> None:
        """Hear of the request of a job that has been answered: a turn later it has been told of.

        Raises:
            Aborted: nobody wants the job any more.
            StepFailed: another job with that prompt, which has been cancelled, was taken for it.
        """
        await self._turns.one()
        it.check()
        if it.request is None:
            self._unmatch(it)  # at once: the next request with that prompt is another's
            raise StepFailed("its request was taken for that of a cancelled job, same prompt")

    async def _commit(self, it: Carried, job: PrefillJob) -> None:
        """Wait until all ranks have exported an answered job, and its request is finished.

        Raises:
            Aborted: nobody wants the job any more.
            StepFailed: some of its KV is lost, or its request may be another's.
        """
        try:
            async with asyncio.timeout(self._lease):
                if job.blocks:
                    await it.until(lambda: it.told >= len(job.tokens))
                await it.until(lambda: it.finished is not None)
        except TimeoutError as error:
            why = f"{self._lease:g} s after its answer its KV was not exported"
            raise StepFailed(why) from error
        it.check()

    def _submit(self, it: Carried, tokens: list[int], sequence: Sequence | None, salt: str) -> Any:
        """Give a request to the engine, known to every rank by its id or to us by its prompt."""
        if self._library.can.own_ids:
            it.request = next(self._numbers if it.job is not None else self._turn_numbers)
            self._requests[it.request] = it
            if it.job is not None:
                self._say_open(it)
        else:
            self._unmatched[digest_of(tokens)].append(it)
        return self._asked(tokens, sequence, salt, it.request)

    async def _sibling(self, it: Carried, tokens: list[int], sequence: Sequence) -> int:
        """Another first token; the prompt is there by now, and is not exported again."""
        if not self._library.can.own_ids:
            it.siblings.append(Carried(it.name, None))
            self._unmatched[digest_of(tokens)].append(it.siblings[-1])
        return await self._answer(it, self._asked(tokens, sequence, self._salt(it), None))

    def _asked(
        self, tokens: list[int], sequence: Sequence | None, salt: str, request: int | None
    ) -> Any:
        """Ask the engine.

        Raises:
            StepFailed: it will not have this request.
            EngineDied: it is gone.
        """
        try:
            return self._library.submit(tokens, sequence, salt, request)
        except (ValueError, TypeError, NotImplementedError, self._library.errors.RequestError) as e:
            raise StepFailed(f"the engine refuses the request: {e}") from e
        except RuntimeError as error:
            raise EngineDied(str(error)) from error

    async def _answer(self, it: Carried, result: Any) -> int:
        """The token that the engine sampled.

        Raises:
            Aborted, StepFailed: there is none.
            EngineDied: there is no engine.
        """
        it.results.append(result)
        await self._over(it, result)
        it.check()
        [output] = result.outputs
        if output.finish_reason not in ("length", "stop") or not output.token_ids:
            raise StepFailed(f"the engine gave it up ({output.finish_reason})")
        return int(output.token_ids[0])

    async def _over(self, it: Carried, result: Any) -> None:
        """Wait for the engine's answer.

        Raises:
            Aborted: there will be none, for the request was cancelled before it was begun.
            StepFailed, EngineDied: as `_answer`.
        """
        while not await self._come(result, LOOK_SECONDS):
            if (it.aborted or it.leaving) and self._library.can.cancels:
                it.leaving = True  # another request may be taken for its, as long as it waits
                await self._turns.one()  # whatever the engine still says of it, it has said by then
                if not await self._come(result, TURN_SECONDS):
                    it.results.remove(result)
                    raise Aborted

    async def _come(self, result: Any, seconds: float) -> bool:
        """Whether the answer came within that time. Raises as `_over`."""
        try:
            async with asyncio.timeout(seconds):
                await result.aresult()
        except TimeoutError:
            return False
        except self._library.errors.RequestError as error:
            raise StepFailed(f"the engine failed the request: {error}") from error
        except RuntimeError as error:
            raise EngineDied(str(error)) from error
        return True

    def _salt(self, it: Carried) -> str:
        """What keeps its KV apart from others': with no salt, from everybody's."""
        assert it.job is not None
        salt = it.job.salt or b"alone" + it.name.encode()
        return hashlib.sha256(salt).hexdigest()[:32]

    def _say_open(self, it: Carried) -> None:
        assert it.request is not None
        if it.job is None or it.leaving:
            self._desk.say(Close(it.request), *self._ranks)
            return
        for rank in self._ranks:
            blocks = it.job.blocks if rank in self._exporting else ()
            self._desk.say(Open(it.request, len(it.job.tokens), blocks, self._lease), rank)

    # ---- its end

    async def _vacate(self, it: Carried) -> None:
        """Return when no rank writes to the arena for it, and its memory is free."""
        it.leaving = True  # what is taken for its request from now on is not exported
        for result in [*it.results]:
            if not result.finished:
                self._cancel(result)
                await self._forget(it, result)
        await self._close(it)
        requests = (it, *it.siblings)
        if any(one.finished is None for one in requests):
            await self._turns.one()  # whatever is still told of them has been told by then
        self._unmatch(it)
        await self._close(it)
        for one in requests:
            await self._let_go(one)

    async def _close(self, it: Carried) -> None:
        """Return when no rank writes to the arena for its request, if that is known."""
        if it.request is not None and not it.closed.issuperset(self._ranks):
            self._desk.say(Close(it.request))
            await it.until(lambda: it.closed.issuperset(self._ranks), abortable=False)

    def _unmatch(self, it: Carried) -> None:
        """Take no further request for one of its."""
        for digest, waiting in list(self._unmatched.items()):
            others = deque(one for one in waiting if one.name != it.name)
            if others:
                self._unmatched[digest] = others
            else:
                del self._unmatched[digest]

    async def _let_go(self, one: Carried) -> None:
        """Return when the engine's memory for a request is free."""
        while one.finished is not None and one.finished.pinned and not self._free(one):
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    await one.until(lambda: self._free(one), abortable=False)
            except TimeoutError:
                await self._turns.one()
        if one.request is not None:
            del self._requests[one.request]

    def _cancel(self, result: Any) -> None:
        """Have the engine give a request up, or leave it to its end where that is safer."""
        if self._library.can.cancels:
            result.abort()

    async def _forget(self, it: Carried, result: Any) -> None:
        try:
            await self._over(it, result)
        except (Aborted, StepFailed) as error:
            log.debug("prefill.forgotten", cause=str(error))

    def _free(self, it: Carried) -> bool:
        return it.released.issuperset(self._ranks)

    async def _turn(self) -> None:
        """Have the executor make a turn, by a request that nobody wants."""
        nudge = Carried(TURN, None)
        await self._over(nudge, self._submit(nudge, TURN_TOKENS, None, TURN))
        await nudge.until(lambda: nudge.finished is not None)
        if nudge.request is not None:
            del self._requests[nudge.request]

    # ---- the ranks

    def hear(self, rank: int, message: FromRank) -> None:
        """Note what a rank, or the scheduler, says."""
        if isinstance(message, Seated):
            self._match(message)
        it = self._requests.get(getattr(message, "request", -1))
        if it is None:
            if isinstance(message, Released) and not self._library.can.own_ids:
                self._note_freed(rank, message.request)
            return
        match message:
            case Seated():
                it.reused = message.reused
                self._pin(it, message.blocks)
            case Finished():
                it.finished = message
                self._pin(it, message.blocks)
            case Exported() if rank in self._exporting:
                it.exported[rank] = message.end
                self._tell_ready(it)
            case Voided():
                it.void = it.void or f"rank {rank}: {message.reason}"
            case Closed():
                it.closed.add(rank)
            case Released():
                it.released.add(rank)
        it.change()

    def _match(self, seated: Seated) -> None:
        """Where the engine counts its requests by itself: the oldest with that prompt it is.

        One that nobody waits for, such as a cancelled job's, is exported nowhere.
        """
        if self._library.can.own_ids or seated.request in self._requests:
            return
        waiting = self._unmatched.get(seated.digest)
        if not waiting:
            self._desk.say(Close(seated.request), *self._ranks)
            return
        it = waiting.popleft()
        if not waiting:
            del self._unmatched[seated.digest]
        it.request = seated.request
        it.released |= self._freed.pop(seated.request, set())
        self._requests[seated.request] = it
        self._say_open(it)

    def _note_freed(self, rank: int, request: int) -> None:
        """Ranks and the scheduler have lines of their own: one may be ahead of the other."""
        self._freed.setdefault(request, set()).add(rank)
        if len(self._freed) > MOST_FREED:
            del self._freed[next(iter(self._freed))]

    def _pin(self, it: Carried, blocks: int) -> None:
        if it.job is not None and it.name in self._jobs:
            it.blocks = max(it.blocks, blocks)
            self.pins[it.name] = it.blocks

    def _tell_ready(self, it: Carried) -> None:
        """What every rank has exported is ready, in all layers."""
        end = min(it.exported.get(rank, 0) for rank in self._exporting)
        if end > it.told and not it.aborted and not it.void:
            start, it.told = it.told, end
            self._events.ready(it.name, start, end)
