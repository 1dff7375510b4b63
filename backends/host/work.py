"""What a worker is working on: prefixes being prefilled and sequences being decoded.

Both are written on the event loop only. While `busy`, a step (or the copies before it) uses
their blocks, and whoever ends them waits for that step before the blocks go free.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backends.api import Logprob, Sequence
from backends.host.ledger import Holder
from backends.protocol import FinishReason, Link, RequestSpec

if TYPE_CHECKING:
    from backends.host.handoff import Push


@dataclass(slots=True, eq=False)
class Prefilling:
    """A prefix whose KV is computed here, from its arrival until its blocks are given back.

    `reused` tokens of it were here already; while they are looked at again it is `checking`.
    """

    link: Link
    spec: RequestSpec
    prefix: list[int]
    holder: Holder
    headroom: Holder
    decode_here: bool
    arrived: float
    deadline: float
    push: Push | None = None
    blocks: list[int] = field(default_factory=list)
    sequences: tuple[Sequence, ...] = ()
    logprobs: list[Logprob] = field(default_factory=list)
    done: int = 0
    started: float | None = None
    links: list[bytes] | None = None
    reused: int = 0
    checking: bool = False
    reported: set[int] = field(default_factory=set)
    busy: bool = False
    ended: bool = False

    @property
    def bound(self) -> bool:
        """Whether the token after the prefix is known already and must not be sampled."""
        return bool(self.spec.sequences[0].generated)


@dataclass(slots=True, eq=False)
class Running:
    """A sequence that is decoded here."""

    link: Link
    handle: int
    index: int
    sequence: Sequence
    blocks: list[int]
    holder: Holder
    max_tokens: int
    deadline: float
    salt: bytes = b""
    paused: bool = False
    busy: bool = False
    ended: bool = False

    @property
    def start(self) -> int:
        """The position that the next step computes."""
        return len(self.sequence.prompt) + len(self.sequence.generated) - 1

    @property
    def computed(self) -> list[int]:
        """The tokens whose KV is final."""
        return (self.sequence.prompt + self.sequence.generated)[: self.start]


def owner(link: Link, spec: RequestSpec) -> str:
    """How the ledger names whom blocks are held for; unique on this worker."""
    return f"{spec.request}#{spec.handle}@{id(link):x}"


def deadline_of(spec: RequestSpec) -> float:
    """When `spec` must have ended, by the event loop's clock."""
    return asyncio.get_running_loop().time() + spec.deadline_seconds


def sequences_of(spec: RequestSpec) -> tuple[Sequence, ...]:
    """The sequences as a backend sees them."""
    return tuple(
        Sequence(
            prompt=spec.prompt,
            generated=list(one.generated),
            sampling=spec.sampling,
            seed=one.seed,
        )
        for one in spec.sequences
    )


def finish_reason(
    sequence: Sequence, token: int, max_tokens: int, end_tokens: frozenset[int]
) -> FinishReason | None:
    """Why the sequence ends with `token`, its newest generated one; None when it goes on."""
    sampling = sequence.sampling
    if len(sequence.generated) > sampling.min_tokens:
        if token in sampling.stop_token_ids:
            return "stop"
        if token in end_tokens and not sampling.ignore_eos:
            return "stop"
    return "length" if len(sequence.generated) >= max_tokens else None
