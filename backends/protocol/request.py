"""A request as workers know it: what every message about its beginning carries."""

from __future__ import annotations

from typing import Annotated

import msgspec

from backends.api import Logprob, Sampling

TokenIds = Annotated[list[int], msgspec.Meta(max_length=1 << 20)]
Claim = Annotated[str, msgspec.Meta(max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class SequenceSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence of a request: how it samples, and the tokens it has already (binding).

    `logprobs` are those of the last of these tokens; for a request that is kept, where wanted.
    """

    index: int
    seed: int
    generated: TokenIds = []
    logprobs: Annotated[tuple[Logprob, ...], msgspec.Meta(max_length=1 << 20)] = ()


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker must know of a request.

    A sequence that already has generated tokens continues them: the handoff carries the KV of
    the prompt and of all generated tokens but the last, which the next decode step computes.
    Sequences of one spec have equally many generated tokens; with more than one, only one
    sequence may be in the spec. `max_tokens` counts generated tokens, earlier ones included.

    KV of full blocks is kept for, and taken from, requests with the same `salt` (see `chain.py`);
    without one it is neither.

    With a `claim`, what the request has here is kept for `keep_seconds` when its connection is
    lost or it is disowned: it goes on, and any gateway that shows a higher `epoch` may adopt it.
    A claim names one request of one client, however many attempts there are at it; each of them
    has an epoch of its own.
    """

    handle: int
    request: str
    prompt: TokenIds
    sequences: Annotated[tuple[SequenceSpec, ...], msgspec.Meta(min_length=1, max_length=128)]
    sampling: Sampling
    max_tokens: int
    deadline_seconds: float
    prompt_logprobs: int | None = None
    salt: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    claim: Claim = ""
    epoch: Count = 0
    keep_seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0

    @property
    def prefix(self) -> list[int]:
        """The tokens whose KV is handed over."""
        generated = self.sequences[0].generated
        return self.prompt + generated[:-1]
