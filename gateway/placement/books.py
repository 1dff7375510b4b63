"""What this gateway has placed and has not seen the end of, and what that means for the next one.

Booked at once when it is placed, so that two requests placed in the same instant see each other.
What other gateways have placed shows in what workers say of their load: this book is subtracted
from that when it is heard, and the rest is taken for theirs until the next time. `now` is the
caller's clock, in seconds. How long things take is learnt on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum

from backends.protocol import BackendInfo, Role
from gateway.placement.costs import STEP_TOKENS
from gateway.placement.estimates import Estimates, Work
from gateway.placement.views import LinkView, Placement, Snapshot, Wish, WorkerView

SHARED = 0.2
"""A prompt that adds less than this part of its own time was computed in steps of another."""


class Stage(Enum):
    """How far a booking has come."""

    PREFILL = 0
    HANDOFF = 1
    DECODE = 2
    OVER = 3


class Booking:
    """One placed prefix. Its owner says how far it has come, and ends it."""

    __slots__ = (
        *("_books", "_forecast", "blocks", "context", "decode", "link_seconds", "prefill"),
        *("prefill_seconds", "sequences", "stage", "tokens"),
    )

    def __init__(self, books: Books, placement: Placement, wish: Wish, block_tokens: int) -> None:
        forecast = self._forecast = placement.forecast
        self._books = books
        self.stage = Stage.PREFILL
        self.prefill = placement.prefill
        self.decode = placement.decode
        self.tokens = wish.tokens - forecast.cached
        self.prefill_seconds = forecast.first_token - forecast.wait
        self.link_seconds = forecast.handoff
        self.sequences = wish.sequences if wish.decodes else 0
        self.context = self.sequences * (wish.tokens + wish.expected // 2)
        grown = -(-(wish.tokens + wish.expected) // block_tokens)
        another = -(-wish.expected // block_tokens)  # the prompt's blocks are shared by all
        self.blocks = grown + (wish.sequences - 1) * another

    @property
    def holder(self) -> str:
        """The worker that holds its KV to the end."""
        return self.decode if self.decode is not None else self.prefill

    def prefilled(self, seconds: float, now: float, cached: int = 0) -> None:
        """Its first token is there, after `seconds` of prefill behind `cached` tokens.

        Safe to call twice.
        """
        if self.stage is Stage.PREFILL:
            # rows of others took their part of it, but never nearly all
            own = max(seconds - self._forecast.beside, seconds / 4)
            tokens = self.tokens + self._forecast.cached
            self._books.learn_prefill(self.prefill, tokens, min(cached, tokens - 1), own, now)
            self._books.leave_prefill(self, now)
            self.stage = Stage.HANDOFF
            if self.decode is None:
                self.landed()

    def landed(self) -> None:
        """Nothing of it is on its way any more. Safe to call twice."""
        if self.stage is Stage.HANDOFF:
            self._books.leave_link(self)
            self._books.decode(self, 1)
            self.stage = Stage.DECODE

    def handed_over(self, count: int, seconds: float) -> None:
        """The decode worker waited `seconds` for the last of `count` bytes."""
        if self.decode is not None:
            self._books.estimates.moved(self.prefill, self.decode, count, seconds)

    def end(self, now: float) -> None:
        """It holds nothing any more. Safe to call twice."""
        if self.stage is Stage.PREFILL:
            self._books.leave_prefill(self, now)
        if self.stage in (Stage.PREFILL, Stage.HANDOFF):
            self._books.leave_link(self)
        if self.stage is Stage.DECODE:
            self._books.decode(self, -1)
        if self.stage is not Stage.OVER:
            self._books.let_go(self)
        self.stage = Stage.OVER


class _Account:
    """One worker's part of the book, and what it said of others' when it last spoke."""

    __slots__ = (
        *("blocks", "blocks_when_told", "busy_until", "context", "decoding", "decoding_context"),
        *("others_running", "others_tokens", "prefills", "rested", "sequences", "told_free"),
        *("prefilled_at", "tokens", "work", "work_seconds"),
    )

    def __init__(self) -> None:
        self.work, self.work_seconds = Work(), 0.0
        self.prefilled_at = 0.0
        self.prefills: dict[Booking, None] = {}  # in the order of placement
        self.tokens = 0
        self.busy_until = 0.0
        self.sequences = self.context = self.blocks = 0
        self.decoding = self.decoding_context = 0
        self.rested = True
        self.others_tokens = self.others_running = 0
        self.told_free: int | None = None
        self.blocks_when_told = 0

    def queued_seconds(self, now: float) -> float:
        """Until all of it is prefilled. A head that is overdue is thought to end any moment."""
        if not self.prefills:
            return 0.0
        head = next(iter(self.prefills))
        behind = sum(it.prefill_seconds for it in self.prefills if it is not head)
        return max(self.busy_until - now, behind)


_NOTHING = _Account()


class Books:
    """All bookings of one gateway, and what it has learnt from them. `freed`: one has ended."""

    def __init__(self, freed: Callable[[], None] = lambda: None) -> None:
        self.estimates = Estimates()
        self._freed = freed
        self._accounts: dict[str, _Account] = {}
        self._links: dict[tuple[str, str], float] = {}

    def place(self, placement: Placement, wish: Wish, block_tokens: int, now: float) -> Booking:
        """Book a placement until it is ended. `block_tokens` is its holder's block size."""
        booking = Booking(self, placement, wish, block_tokens)
        account = self._account(booking.prefill)
        account.prefills[booking] = None
        account.tokens += booking.tokens
        account.busy_until = max(now, account.busy_until) + booking.prefill_seconds
        if booking.decode is not None:
            pair = booking.prefill, booking.decode
            self._links[pair] = self._links.get(pair, 0.0) + booking.link_seconds
        self._hold(booking, 1)
        return booking

    def told(self, worker: str, *, waiting_tokens: int, running: int, free_blocks: int) -> None:
        """What the worker says of its load, this gateway's part included."""
        account = self._account(worker)
        account.others_tokens = max(0, waiting_tokens - account.tokens)
        account.others_running = max(0, running - account.sequences)
        account.told_free = free_blocks
        account.blocks_when_told = account.blocks

    def stepped(self, worker: str, max_batch: int, seconds: float) -> None:
        """Its decode steps since the last call took `seconds` each, this gateway's rows say."""
        it = self._account(worker)
        if not it.rested:
            sequences = it.decoding + it.others_running
            part = min(1.0, max_batch / max(1, sequences))  # the others have waited for their turn
            context = it.decoding_context * part
            self.estimates.stepped(worker, sequences * part, context, seconds)
        it.rested = it.decoding == 0

    def forget(self, worker: str) -> None:
        """The worker is gone; bookings on it end with whoever made them."""
        self.estimates.forget(worker)
        account = self._accounts.get(worker)
        if account is not None:
            account.told_free = None
            account.others_tokens = account.others_running = 0
            self._tidy(worker, account)

    # ---- what placement looks at

    def view(
        self,
        worker: str,
        role: Role,
        info: BackendInfo,
        now: float,
        *,
        draining: bool = False,
        left_alone: str = "",
        step_tokens: int = 0,
        kept: AbstractSet[int] = frozenset(),
    ) -> WorkerView:
        """What is known of a connected worker."""
        it = self._accounts.get(worker) or _NOTHING
        prefill = self.estimates.prefill(worker)
        theirs = prefill.seconds(it.others_tokens) if it.others_tokens else 0.0
        told = it.told_free if it.told_free is not None else info.capacity_blocks
        since = max(0, it.blocks - it.blocks_when_told)
        return WorkerView(
            id=worker,
            role=role,
            info=info,
            queued_tokens=it.tokens + it.others_tokens,
            queued_seconds=it.queued_seconds(now) + theirs,
            running=it.sequences + it.others_running,
            context=it.context,
            free_blocks=min(told - since, info.capacity_blocks - it.blocks),
            draining=draining,
            left_alone=left_alone,
            step_tokens=step_tokens or STEP_TOKENS,
            prefill=prefill,
            step=self.estimates.step(worker),
            kept=kept,
        )

    def snapshot(
        self,
        workers: Iterable[WorkerView],
        pairs: frozenset[tuple[str, str]],
        left_alone: Mapping[tuple[str, str], str] = {},
    ) -> Snapshot:
        """The workers, the pairs of them that can hand over, what that costs, and other pairs."""
        links = {
            pair: LinkView(cost=self.estimates.link(*pair), queued_seconds=self._links.get(pair, 0))
            for pair in pairs
        }
        return Snapshot(tuple(workers), pairs, links, left_alone)

    # ---- for bookings

    def learn_prefill(
        self, worker: str, tokens: int, cached: int, seconds: float, now: float
    ) -> None:
        """A prompt took `seconds` up to now, perhaps in steps with others.

        What lies before the end of the one that ended before is time of that one. Prompts that end
        in the same step are learnt from together.
        """
        it = self._account(worker)
        own = min(seconds, now - it.prefilled_at)
        it.prefilled_at = now
        if own > SHARED * seconds and it.work.prompts:
            self.estimates.prefilled(worker, it.work, it.work_seconds)
            it.work, it.work_seconds = Work(), 0.0
        it.work = it.work.and_prompt(tokens, cached)
        it.work_seconds += own

    def leave_prefill(self, booking: Booking, now: float) -> None:
        """It is prefilled, or will not be."""
        account = self._account(booking.prefill)
        first = next(iter(account.prefills)) is booking
        del account.prefills[booking]
        account.tokens -= booking.tokens
        if first:  # what is behind it begins now
            account.busy_until = now + sum(it.prefill_seconds for it in account.prefills)
        else:
            account.busy_until -= booking.prefill_seconds

    def leave_link(self, booking: Booking) -> None:
        """Its KV is on its way no more."""
        if booking.decode is not None:
            pair = booking.prefill, booking.decode
            left = self._links.pop(pair, 0.0) - booking.link_seconds
            if left > 1e-9:  # else what is left is less than a rounding error
                self._links[pair] = left

    def decode(self, booking: Booking, sign: int) -> None:
        """It begins to be decoded (1), or is decoded no more (-1)."""
        account = self._account(booking.holder)
        account.decoding += sign * booking.sequences
        account.decoding_context += sign * booking.context
        account.rested = account.rested or account.decoding == 0

    def let_go(self, booking: Booking) -> None:
        """It holds no memory any more."""
        self._hold(booking, -1)
        for worker in {booking.prefill, booking.holder}:
            self._tidy(worker, self._account(worker))
        self._freed()

    # ---- inside

    def _account(self, worker: str) -> _Account:
        account = self._accounts.get(worker)
        if account is None:
            account = self._accounts[worker] = _Account()
        return account

    def _hold(self, booking: Booking, sign: int) -> None:
        account = self._account(booking.holder)
        account.sequences += sign * booking.sequences
        account.context += sign * booking.context
        account.blocks += sign * booking.blocks

    def _tidy(self, worker: str, account: _Account) -> None:
        """Keep no account of a worker that is gone and holds nothing."""
        if account.told_free is None and not account.prefills and not account.blocks:
            self._accounts.pop(worker, None)
