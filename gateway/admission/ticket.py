"""What the queue is told of a request, on which terms it stands there, and what it may hope for."""

from __future__ import annotations

from math import inf
from typing import Self

import msgspec

from gateway.config import Config

HIGHEST_PRIORITY = 7
LOWEST_PRIORITY = -8


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant may expect: its share beside others, and its limits; 0 means none.

    Requests and tokens are per minute, `concurrent` counts requests that wait or run.
    """

    weight: float = 1.0
    requests: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    concurrent: int = 0


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to run one request.

    `deadline` is a time of this process's event-loop clock, and so is `first_token_by`, after
    which nobody needs the first token.

    `prefill_tokens` are computed first, `decode_tokens` are the most KV that it will hold and what
    its tenant's share is counted in; `expected_tokens` of them are to be generated, which are
    settled to what really was. `needs_seconds` is the least time to its first token: once less is
    left, it fails. A higher `priority` (-8 to 7) goes first. A ticket that does not count is a
    further part of a request that has been counted.

    `name` is its own in the whole deployment: whoever enqueues it again takes it over, unless that
    is an earlier owner, whose `owner_epoch` is lower. Empty: one is made up.
    """

    id: str
    model: str
    tenant: str
    prefill_tokens: int
    decode_tokens: int
    deadline: float
    expected_tokens: int = 0
    first_token_by: float = inf
    needs_seconds: float = 0.0
    priority: int = 0
    terms: Terms = Terms()
    counts: bool = True
    name: str = ""
    owner_epoch: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many wait, how long a lease is, and how long to hope."""

    max_waiting: int = 1024
    lease_seconds: float = 10.0
    worker_wait_seconds: float = 30.0
    outage_seconds: float = 5.0
    timeout_seconds: float = 2.0

    @classmethod
    def of(cls, config: Config) -> Self:
        """The limits that the configuration sets."""
        return cls(
            max_waiting=config.queue.max_waiting,
            lease_seconds=config.queue.lease_seconds,
            worker_wait_seconds=config.queue.worker_wait_seconds,
            outage_seconds=config.redis.outage_seconds,
            timeout_seconds=config.redis.timeout_seconds,
        )
