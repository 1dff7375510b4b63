"""The sender's end of one handoff, whatever the transport."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import partial

import msgspec

from transfer.contract import TOUCH_SECONDS, KVSlice, Receipt, Source
from transfer.convert import Tamper, TamperNote, check_part, rest_of
from transfer.digest import PrefixDigest, landing_key, seal
from transfer.errors import DigestMismatch, LandingGone, PeerLost, PeerMisbehaved, TransferError
from transfer.layout import Landing
from transfer.plan import Plan
from transfer.pool import Pool
from transfer.session import wire
from transfer.session.mover import Outgoing
from transfer.session.outgoing import Session

JOINED_BYTES = 8 << 20
"""Slices that wait are written as one, up to about so much: the queue's room is free after that."""


class SessionWriter:
    """A `Writer`. What it is told to write is queued, within a bound, for the session's thread."""

    def __init__(
        self,
        session: Session,
        agreed: Plan,
        landing: Landing,
        source: Source,
        tamper: Tamper | None,
        tamper_note: TamperNote | None,
    ) -> None:
        """Show the right to `landing`; its refusal is heard at a later write or commit.

        Raises:
            ValueError: pool, blocks and tokens of either side contradict each other.
            PeerLost: the session is lost.
            PeerMisbehaved: the landing contradicts itself.
        """
        self._session = session
        self._landing = landing
        self._plan = agreed
        self._tokens = source.tokens
        self._tamper_note = tamper_note
        pool = Pool.of(agreed.source, source.pool_blocks, source.pool)
        source = msgspec.structs.replace(source, pool=pool)
        self._digest = _digest_of(agreed, source, landing) if session.digest else None
        loop = asyncio.get_running_loop()
        self._granted: asyncio.Future[None] = loop.create_future()
        self._answer: asyncio.Future[wire.Answer] = loop.create_future()
        self._released: asyncio.Future[None] = loop.create_future()
        self._error: BaseException | None = None
        self._committed = False
        self._stopped = False
        self._releasing = False
        self._touched_at = float("-inf")
        self._queue: deque[tuple[KVSlice, int]] = deque()
        self._ticket = session.next_ticket
        self._move = session.mover.begin(
            Outgoing(self._ticket, agreed, source, landing, self._digest, self._over, tamper)
        )
        session.enter(self)
        ask = session.mover.waits_for_grant
        place = landing.place if ask else b""
        session.send(wire.Open(self._ticket, landing.id, landing.epoch, landing.secret, ask, place))

    # ---- the contract -----------------------------------------------------------------------

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`; returns when `part` is queued. Each slice is written once."""
        check_part(part, self._plan.target.layers, self._tokens)
        self._raise_if_over()
        await self._permission()
        rest = rest_of(part, self._landing.present)
        target = self._plan.target
        tokens = (rest.end - rest.start) * rest.layers if rest is not None else 0
        size = tokens * target.token_bytes // target.layers
        await self._session.backlog.take(size)
        try:
            self._raise_if_over()
        except BaseException:
            self._session.backlog.give(size)
            raise
        self._queue.append((part, size))
        if len(self._queue) == 1:
            self._session.submit(self._write)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`."""
        if len(note) > wire.MAX_NOTE_BYTES:
            raise ValueError(f"note: {len(note)} bytes, at most {wire.MAX_NOTE_BYTES}")
        self._raise_if_over()
        self._committed = True
        self._session.submit(partial(self._commit, note))
        async with asyncio.timeout(seconds):
            answer = await self._answer
        if answer.outcome == "mismatch":
            raise DigestMismatch(answer.detail)
        return Receipt(answer.verify_seconds, answer.answer, answer.size)

    async def abort(self) -> None:
        """As `Writer.abort`."""
        self._stopped = True
        self._release()
        patience = self._session.stall_seconds
        await asyncio.wait([self._released], timeout=patience)
        if not self._released.done():
            self._session.lose(PeerLost(f"an abort took more than {patience} s"))
            await asyncio.wait([self._released], timeout=patience)

    # ---- what the session tells -------------------------------------------------------------

    def granted(self) -> None:
        """The receiver knows the writer."""
        if not self._granted.done():
            self._granted.set_result(None)

    def answered(self, answer: wire.Answer) -> None:
        """Hear how the handoff ended."""
        if answer.outcome == "gone":
            self._fail(LandingGone(answer.detail))
        elif not self._committed:
            self._fail(PeerMisbehaved("it answers a commit that was not sent"))
        elif not self._answer.done():
            self._answer.set_result(answer)
        self._release()

    def lost(self, reason: PeerLost) -> None:
        """Hear that the session has ended."""
        self._fail(reason)
        self._release()

    # ---- in the session's thread ------------------------------------------------------------

    def _over(self) -> bool:
        return self._stopped or self._error is not None or self._session.broken

    def _write(self) -> None:
        """Write all that is queued. What is being written stays in the queue until it is."""
        while self._queue:
            part, size, count = self._next()
            self._write_one(part)
            self._session.backlog.give(size)
            for _ in range(count):
                self._queue.popleft()

    def _next(self) -> tuple[KVSlice, int, int]:
        """The next slice, with those behind it that are one with it: their bytes, their number."""
        (joined, size), count = self._queue[0], 1
        while size < JOINED_BYTES and count < len(self._queue):
            part, more = self._queue[count]
            both = joined.joined(part)
            if both is None:
                break
            joined, size, count = both, size + more, count + 1
        return joined, size, count

    def _write_one(self, part: KVSlice) -> None:
        try:
            rest = rest_of(part, self._landing.present)
            if rest is not None and not self._over():
                self._move.write(rest)
            if not self._over() and not self._committed:  # which would come right after it
                self._touch()
        except OSError as error:
            self._session.break_down(PeerLost(f"a write failed: {error!r}"))
        except Exception as error:
            self._session.call_soon(self._fail, error)

    def _touch(self) -> None:
        now = time.monotonic()
        if now - self._touched_at >= TOUCH_SECONDS:
            self._touched_at = now
            self._session.send(wire.Touch(self._ticket))

    def _commit(self, note: bytes) -> None:
        if self._over():
            return
        try:
            proof = self._move.settle()
        except OSError as error:
            self._session.break_down(PeerLost(f"a write failed: {error!r}"))
        else:
            digest = self._digest.result() if self._digest is not None else b""
            sealed = seal(self._landing, digest, note)
            if self._tamper_note is not None:
                note = self._tamper_note(note)
            self._session.send(wire.Commit(self._ticket, digest, sealed, proof, note))

    def _let_go(self) -> None:
        self._move.release()
        self._session.send(wire.Released(self._ticket, lost=self._session.broken))
        self._session.call_soon(self._let_gone)

    # ---- on the event loop ------------------------------------------------------------------

    async def _permission(self) -> None:
        """Wait until the receiver knows us, where the transport needs that."""
        if not self._session.mover.waits_for_grant or self._granted.done():
            return
        patience = self._session.stall_seconds
        await asyncio.wait([self._granted], timeout=patience)
        if not self._granted.done():
            raise PeerLost(f"an opening was not answered in {patience} s")
        self._raise_if_over()

    def _release(self) -> None:
        if not self._releasing:
            self._releasing = True
            self._session.submit(self._let_go)

    def _let_gone(self) -> None:
        self._session.leave(self._ticket)
        self._released.set_result(None)

    def _raise_if_over(self) -> None:
        if isinstance(self._error, TransferError):
            raise type(self._error)(str(self._error)) from self._error
        if self._error is not None:
            raise self._error
        if self._committed or self._stopped:
            raise LandingGone(f"landing {self._landing.id} was used already")

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self.granted()  # nothing will be; whoever waits for it sees the error
        if self._committed and not self._answer.done():
            self._answer.set_exception(error)


def _digest_of(agreed: Plan, source: Source, landing: Landing) -> PrefixDigest:
    """The source as the receiver will look at its pool."""
    return PrefixDigest(
        agreed,
        source.pool,
        source.pool_blocks,
        source.blocks,
        source.tokens,
        landing_key(landing),
    )
