"""What a worker is working on: prefixes being prefilled and sequences being decoded.

All is written on the event loop only. While an item is `busy`, a step (or the copies before it)
uses its blocks, and whoever ends it waits for that step before the blocks go free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backends.api import Logprob, Sequence
from backends.host.ledger import Holder
from backends.protocol import Failed, FinishReason, First, Link, Message, RequestSpec, Token

if TYPE_CHECKING:
    from backends.host.handoff import Push


@dataclass(slots=True, eq=False)
class Track:
    """The tokens of one sequence so far, kept for whoever adopts it.

    `logprobs` are those of its last tokens, where they were asked for. `lost`: it cannot go on
    here, and must be prefilled again from these tokens.
    """

    tokens: list[int]
    logprobs: list[Logprob]
    finish: FinishReason | None = None
    lost: bool = False

    def add(self, token: int, finish: FinishReason | None, logprob: Logprob | None) -> None:
        """One more token."""
        self.tokens.append(token)
        self.finish = finish
        if logprob is not None:
            self.logprobs.append(logprob)

    def rows(self, handle: int, index: int) -> list[Token]:
        """All of it, as its owner gets it."""
        unknown = len(self.tokens) - len(self.logprobs)
        last = len(self.tokens) - 1
        return [
            Token(
                handle,
                index,
                position,
                token,
                self.finish if position == last else None,
                self.logprobs[position - unknown] if position >= unknown else None,
            )
            for position, token in enumerate(self.tokens)
        ]


@dataclass(slots=True, eq=False)
class Held:
    """What one request holds here, and for whom.

    `link` and `handle` are its owner's; they change when another gateway adopts it, and `link` is
    None while nobody owns it. `name` is how the ledger calls it, unique on this worker. `epoch` is
    the owner's, `born` that of its beginning. What is kept (`claim` is not empty) has a track for
    each sequence, and stays until its owner lets go, nobody wants it, or `deadline` passes;
    `failure` says why it cannot go on.
    """

    link: Link | None
    handle: int
    name: str
    deadline: float = 0.0
    claim: str = ""
    keep_seconds: float = 0.0
    born: int = 0
    epoch: int = 0
    tracks: dict[int, Track] = field(default_factory=dict)
    failure: Failed | None = None
    prefilling: Prefilling | None = None
    landing: str | None = None
    running: dict[int, Running] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether nothing is computed, awaited or held in the pool for it."""
        return self.prefilling is None and self.landing is None and not self.running

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return sum(len(track.tokens) for track in self.tracks.values())

    def tell(self, message: Message) -> None:
        """Send `message` to the owner, if there is one."""
        if self.link is not None:
            self.link.send(message)

    def note(self, firsts: Iterable[First]) -> None:
        """Keep the first tokens of sequences that are kept."""
        for first in firsts:
            track = self.tracks.get(first.index)
            if track is not None and not track.tokens:
                track.add(first.token, first.finish, first.logprob)


@dataclass(slots=True, eq=False)
class Prefilling:
    """A prefix whose KV is computed here, from its arrival until its blocks are given back.

    `reused` tokens of it were here already; while they are looked at again it is `checking`.
    """

    held: Held
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

    @classmethod
    def of(cls, held: Held, spec: RequestSpec, *, decode_here: bool) -> Prefilling:
        """A prefix that has just arrived."""
        return cls(
            held=held,
            spec=spec,
            prefix=spec.prefix,
            holder=Holder("prefill", held.name),
            headroom=Holder("headroom", held.name),
            decode_here=decode_here,
            arrived=time.monotonic(),
            deadline=held.deadline,
            sequences=sequences_of(spec),
        )

    @property
    def bound(self) -> bool:
        """Whether the token after the prefix is known already and must not be sampled."""
        return bool(self.spec.sequences[0].generated)


@dataclass(slots=True, eq=False)
class Running:
    """A sequence that is decoded here."""

    held: Held
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


def given_up(handle: int, indexes: tuple[int, ...], code: str, detail: str) -> Failed:
    """Some sequences cannot go on here; prefilling them again may help."""
    return Failed(
        handle=handle, phase="decode", code=code, detail=detail, retry=True, indexes=indexes
    )


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
