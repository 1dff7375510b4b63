"""What the HTTP side asks of the relay, and what the relay promises to tell it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import Protocol

import msgspec

from backends.protocol import FinishReason, Logprob, Sampling
from gateway.admission.ticket import Terms
from gateway.quota import Quota
from gateway.resume import JobClaim


def _nobody(_: Quota) -> None:
    return


class Job(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One prompt to be continued `n` times. `seeds` has one entry per sequence.

    `id` is for logs and may be the client's choice: two jobs can bear the same one.

    `salt` names whose KV may be reused for it (see `backends.chain`); empty: nobody's.

    `deadline` is a time of this process's event-loop clock. `decode_estimate` is how many tokens
    the answer will probably have, per sequence; the queue books it. The first token must be there
    by `first_token_by`, a time of the same clock, or nobody needs it; the gaps between tokens
    should be within `gap_seconds`. `terms` are the tenant's, and `told` hears what is left to it;
    the second job of one request does not count as another. With a `claim` its client may ask for
    it again.
    """

    id: str
    model: str
    tenant: str
    prompt: list[int]
    seeds: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    deadline: float
    decode_estimate: int
    priority: int = 0
    terms: Terms = Terms()
    counts: bool = True
    told: Callable[[Quota], None] = _nobody
    prompt_logprobs: int | None = None
    salt: bytes = b""
    first_token_by: float = inf
    gap_seconds: float = inf
    claim: JobClaim | None = None

    @property
    def n(self) -> int:
        """How many sequences continue the prompt."""
        return len(self.seeds)

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return asyncio.get_running_loop().time() >= self.deadline


Take = Callable[[int, FinishReason | None, Logprob | None], bool]
"""Takes a sequence's next token, in order, none missing and none twice.

The finish reason is set on its last one. True: it has seen enough (a stop string); the relay
ends the sequence and this is not called again.
"""


class Listener(Protocol):
    """Takes a job's tokens. Called on the event loop; must not block or raise."""

    def sequence(self, index: int) -> Take:
        """Who takes the tokens of sequence `index`; asked once, before the first."""

    def prompt_logprobs(self, logprobs: tuple[Logprob, ...]) -> None:
        """Log probabilities of the prompt's tokens from the second on; before any `token`."""


class Carrier(Protocol):
    """The relay, as the HTTP side sees it."""

    async def carry(self, job: Job, listener: Listener) -> Timeline:
        """Take `job` through queue, prefill, handoff and decode; return when it has ended.

        Cancelling this call frees everything the job held, on every worker; one with a claim is
        kept there for a while.

        Raises:
            GatewayError: one of the tree in `gateway.errors`, with phase, peer and cause.
        """

    def pause(self, job: Job, index: int, paused: bool) -> None:
        """Stop or resume decoding one sequence, because its client reads too slowly."""


class Timeline(msgspec.Struct, kw_only=True):
    """Where a job's time went, in seconds. None: it did not get there.

    Time to first token is the sum of `queue`, `place`, `reserve`, `prefill_wait`, `prefill`,
    and what the HTTP side adds before and after; `exposed_transfer` and `verify` belong to the
    first gap, as does `first_step` (from the admission to the second token here);
    `overlapped_transfer` costs nothing and is shown apart. The KV of the prompt's first
    `cached_tokens` did not have to be computed, that of its first `present_tokens` not to be sent.
    `emulated` says after what the workers' own times are made up, where they are.
    `unaccounted` is what of `first_token` the other durations do not explain.
    """

    queue: float | None = None
    place: float | None = None
    reserve: float | None = None
    prefill_wait: float | None = None
    prefill: float | None = None
    exposed_transfer: float | None = None
    overlapped_transfer: float | None = None
    verify: float | None = None
    first_step: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    present_tokens: int = 0
    retries: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    emulated: str = ""

    @property
    def unaccounted(self) -> float | None:
        """What of `first_token` no phase explains: messages on their way, and retries."""
        if self.first_token is None:
            return None
        phases = (self.queue, self.place, self.reserve, self.prefill_wait, self.prefill)
        return self.first_token - sum(phase or 0.0 for phase in phases)
