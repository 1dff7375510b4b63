"""What is said to the scripts, one struct each; they see tables with the same names."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.admission.ticket import HIGHEST_PRIORITY, LOWEST_PRIORITY, Ticket
from gateway.quota import Allowance, Quota


class RateLimits(msgspec.Struct, frozen=True):
    """Per minute; 0: no limit."""

    requests: int
    prefill: int
    decode: int


class TicketWords(msgspec.Struct, frozen=True):
    """A ticket, as it lies in Redis. Tokens; bands count from the highest priority.

    `visit` tells it from other tickets of its name that its gateway has or had, `owner` grows with
    each new owner of its request.
    """

    visit: int
    owner: int
    tenant: str
    prefill: int
    decode: int
    expected: int
    weight: float
    band: int
    counts: int
    concurrent: int
    limited: bool
    limits: RateLimits


class Enqueue(msgspec.Struct, frozen=True, kw_only=True):
    """Times are milliseconds from now. `again`: it was let in before, and Redis has lost it."""

    id: str
    ticket: TicketWords
    patience: int
    deadline: int
    max_waiting: int
    again: bool


class Leave(msgspec.Struct, frozen=True):
    """Names with visit and tokens they generated, and names with the epoch of their lease."""

    over: list[tuple[str, int, int]] = []
    prefilled: list[tuple[str, int]] = []


class Requeue(msgspec.Struct, frozen=True):
    """`worker` had no room of `kind` (`prefill` or `decode`). Patience is in milliseconds."""

    id: str
    epoch: int
    worker: str
    kind: str
    prefill: int
    patience: int


class Renew(msgspec.Struct, frozen=True):
    """What a gateway holds and waits for; `last` when no more of it follows."""

    last: bool
    held: list[tuple[str, int, TicketWords]]
    waiting: list[str]


class Publish(msgspec.Struct, frozen=True):
    """A worker's offer; its record is a word of its own."""

    incarnation: int
    prefill: int
    decode: int


class Withdraw(msgspec.Struct, frozen=True):
    """A worker takes its offer back."""

    incarnation: int


Wish = Enqueue | Leave | Requeue | Renew | Publish | Withdraw


class Report(msgspec.Struct, frozen=True):
    """What every call brings home. `look_ms`: when to look again for room; 0 is never.

    `granted` are names and epochs, in turn.
    """

    staffed: bool
    depth: int
    look_ms: int
    granted: list[Any]

    def grants(self) -> list[tuple[str, int]]:
        """Names and epochs."""
        return pairs(self.granted)


def pairs(flat: list[Any]) -> list[tuple[str, int]]:
    """Names and epochs out of a list in which they take turns."""
    names = (name.decode() if isinstance(name, bytes) else name for name in flat[::2])
    return list(zip(names, flat[1::2], strict=True))


def words_of(ticket: Ticket, visit: int, prefill_tokens: int) -> TicketWords:
    """What Redis keeps of `ticket` while that much of its prompt is still to be computed."""
    terms = ticket.terms
    limits = RateLimits(terms.requests, terms.prefill_tokens, terms.decode_tokens)
    priority = min(max(ticket.priority, LOWEST_PRIORITY), HIGHEST_PRIORITY)
    return TicketWords(
        visit=visit,
        owner=ticket.owner_epoch,
        tenant=ticket.tenant,
        prefill=prefill_tokens,
        decode=ticket.decode_tokens,
        expected=ticket.expected_tokens,
        weight=terms.weight,
        band=HIGHEST_PRIORITY - priority,
        counts=int(ticket.counts),
        concurrent=terms.concurrent,
        limited=bool(limits.requests or limits.prefill or limits.decode),
        limits=limits,
    )


def quota_of(flat: list[int]) -> Quota:
    """The tenant's quota, from triples of limit, rest and milliseconds until it is whole."""
    told = [
        Allowance(limit, max(0, remaining), reset_ms / 1000) if limit else None
        for limit, remaining, reset_ms in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
    ]
    return Quota(*told)
