"""One ticket in the hands of its gateway: waiting, granted, given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from gateway.admission.ticket import Ticket
from gateway.admission.wishes import TicketWords, words_of
from gateway.errors import GatewayError
from gateway.quota import Quota


class Turn:
    """`granted` is done once it may run, or with the reason why it never will.

    `visit` tells it from other turns of the same name that this gateway takes.
    `epoch` is that of its latest grant, 0 before the first; a grant counts only when it is later.
    """

    __slots__ = (
        *("asked", "begun", "epoch", "granted", "held", "name", "prefill_tokens"),
        *("refusals", "ticket", "told", "visit"),
    )

    def __init__(
        self, name: str, visit: int, ticket: Ticket, told: Callable[[Quota], None]
    ) -> None:
        self.name = name
        self.visit = visit
        self.ticket = ticket
        self.told = told
        self.granted: asyncio.Future[GatewayError | None]
        self.prefill_tokens = ticket.prefill_tokens
        self.epoch = 0
        self.refusals = 0
        self.asked = False
        self.begun = False
        self.held = False
        self.wait()

    def wait(self) -> None:
        """It holds nothing (any more), and waits for a grant."""
        self.held = False
        self.granted = asyncio.get_running_loop().create_future()

    def grant(self, epoch: int) -> None:
        """It may run. Of what is told twice or late nothing comes."""
        if epoch > self.epoch:
            self.epoch = epoch
            self.held = True
            if not self.granted.done():
                self.granted.set_result(None)

    def fail(self, error: GatewayError) -> None:
        """It will not run, unless it does already."""
        if not self.granted.done():
            self.granted.set_result(error)

    @property
    def due(self) -> float:
        """When its first token must be there, or, once that is, its last one."""
        ticket = self.ticket
        return ticket.deadline if self.begun else min(ticket.deadline, ticket.first_token_by)

    @property
    def latest(self) -> float:
        """Until when a grant is of use."""
        return self.due if self.begun else self.due - self.ticket.needs_seconds

    @property
    def words(self) -> TicketWords:
        """What Redis keeps of it."""
        return words_of(self.ticket, self.visit, self.prefill_tokens)


class Left(msgspec.Struct, frozen=True):
    """Something to give back: a ticket that is over, with the tokens it generated, or its prefill.

    `epoch` is that of the lease whose prefill is done, 0 for a ticket that is over.
    """

    model: str
    name: str
    visit: int = 0
    generated: int = 0
    epoch: int = 0


class Grant:
    """The right to run, until the turn is left."""

    def __init__(
        self,
        turn: Turn,
        leaving: asyncio.Queue[Left],
        requeue: Callable[[Turn, str, str], Awaitable[None]],
    ) -> None:
        self._turn = turn
        self._leaving = leaving
        self._requeue = requeue

    def prefilled(self) -> None:
        """Prefill is done: the next one may have its room. Safe to call twice."""
        turn = self._turn
        turn.begun = True
        if turn.prefill_tokens and turn.held:
            turn.prefill_tokens = 0
            self._leaving.put_nowait(Left(turn.ticket.model, turn.name, epoch=turn.epoch))

    async def again(self, worker: str, kind: str) -> None:
        """Go back to the old place, as `worker` had no room (`prefill` or `decode`).

        That worker's credit shrinks. Returns with the next grant.

        Raises:
            DeadlineExceeded: the deadline cannot be met any more.
            NoWorkers: no worker was there for `worker_wait_seconds`.
            QueueUnavailable: Redis was lost for too long.
            TakenOver: somebody has asked for it again, and has its place.
        """
        self._turn.prefill_tokens = self._turn.ticket.prefill_tokens
        await self._requeue(self._turn, worker, kind)
