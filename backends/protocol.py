"""The messages between a gateway and a worker: MessagePack in length-prefixed frames.

A frame is a 4-byte big-endian length, then one message. Unknown fields are ignored, so that
neighbouring versions understand each other; a field is added, never changed. The gateway
chooses `handle`, a number that names one request on this connection; a sequence is
`(handle, index)`. Times are durations in seconds: no two clocks are compared.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

import msgspec

from backends.api import BackendInfo, Logprob, Sampling
from transfer.layout import Endpoint, KVLayout, Landing

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
LENGTH = struct.Struct(">I")

TokenIds = Annotated[list[int], msgspec.Meta(max_length=1 << 20)]
Role = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Anything that travels on the control connection."""


class SequenceSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence of a request: how it samples, and the tokens it has already (binding)."""

    index: int
    seed: int
    generated: TokenIds = []


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker must know of a request.

    A sequence that already has generated tokens continues them: the handoff carries the KV of
    the prompt and of all generated tokens but the last, which the next decode step computes.
    Sequences of one spec have equally many generated tokens; with more than one, only one
    sequence may be in the spec. `max_tokens` counts generated tokens, earlier ones included.
    """

    handle: int
    request: str
    prompt: TokenIds
    sequences: Annotated[tuple[SequenceSpec, ...], msgspec.Meta(min_length=1, max_length=128)]
    sampling: Sampling
    max_tokens: int
    deadline_seconds: float
    prompt_logprobs: int | None = None

    @property
    def prefix(self) -> list[int]:
        """The tokens whose KV is handed over."""
        generated = self.sequences[0].generated
        return self.prompt + generated[:-1]


# ---- gateway to worker ---------------------------------------------------------------------


class Hello(Message):
    """First on the connection, with the shared secret (empty when none is set)."""

    version: int
    gateway: str
    secret: str = ""


class Meet(Message):
    """To a prefill worker: connect to this decode worker now, before a request needs it."""

    worker: str
    incarnation: int
    layout: KVLayout
    endpoints: tuple[Endpoint, ...]


class Reserve(Message):
    """To a decode worker: set blocks aside for this request's prefix and answer with a landing."""

    spec: RequestSpec


class Prefill(Message):
    """To a prefill worker: compute the prefix and hand it over into `landing`.

    Without a landing the first token is all that is wanted (`prefill`), or the same worker
    decodes on (`both`).
    """

    spec: RequestSpec
    landing: Landing | None = None
    decode_here: bool = False


class Cancel(Message):
    """Stop this request, or those of its sequences that `indexes` names, and free its blocks."""

    handle: int
    indexes: tuple[int, ...] | None = None


class Flow(Message):
    """Pause one sequence, or let it go on: its client reads too slowly."""

    handle: int
    index: int
    paused: bool


class Inspect(Message):
    """Ask for the ledger."""

    ticket: int


# ---- worker to gateway ---------------------------------------------------------------------


class Welcome(Message):
    """First from the worker: who it is and what its backend states."""

    version: int
    worker: str
    incarnation: int
    role: Role
    info: BackendInfo
    endpoints: tuple[Endpoint, ...] = ()


class Rejected(Message):
    """Instead of `Welcome`: why this connection is refused. The worker closes it."""

    reason: str


class Met(Message):
    """Answer to `Meet`: the plan in one line, or why the pair can never be placed."""

    worker: str
    transport: str = ""
    plan: str = ""
    refusal: str = ""


class Granted(Message):
    """Answer to `Reserve`."""

    handle: int
    landing: Landing


class Refused(Message):
    """Answer to `Reserve` or `Prefill`: not now (`full`) or not ever (`invalid`)."""

    handle: int
    kind: Literal["full", "invalid", "draining"]
    detail: str


class First(msgspec.Struct, frozen=True, array_like=True):
    """The first token of one sequence."""

    index: int
    token: int
    finish: FinishReason | None = None
    logprob: Logprob | None = None


class FirstToken(Message):
    """From the prefill worker, before the commit; its durations in seconds.

    `first` is empty when the sequences' next tokens were already bound.
    """

    handle: int
    first: tuple[First, ...]
    wait: float
    prefill: float
    prompt_logprobs: tuple[Logprob, ...] = ()


class HandedOver(Message):
    """From the prefill worker, after the commit: its part in the handoff is over.

    `exposed` is the time from the last layer's being final to the last write; `overlapped` the
    time that pushing took before that.
    """

    handle: int
    bytes: int
    exposed: float
    overlapped: float
    verify: float


class Landed(Message):
    """From the decode worker: the prefix is verified and admitted."""

    handle: int
    verify: float


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `position` counts generated tokens of the sequence from 0."""

    handle: int
    index: int
    position: int
    token: int
    finish: FinishReason | None = None
    logprob: Logprob | None = None


class Tokens(Message):
    """All that one decode step gave to this gateway."""

    step: int
    rows: tuple[Token, ...]


class Failed(Message):
    """A request, or some of its sequences, ended badly here. `retry`: prefill again may help.

    `landing`: the handoff failed before the prefix was admitted.
    """

    handle: int
    phase: Literal["reserve", "prefill", "handoff", "decode"]
    code: str
    detail: str
    retry: bool
    indexes: tuple[int, ...] | None = None


class Load(Message):
    """How full the worker is; sent once a second and when it changes much."""

    free_blocks: int
    pool_blocks: int
    running: int
    waiting: int
    waiting_tokens: int
    draining: bool = False


class Ledger(Message):
    """Answer to `Inspect`: holders, their reasons and block counts, and whether it balances."""

    ticket: int
    worker: str
    pool_blocks: int
    free_blocks: int
    holders: tuple[tuple[str, str, int], ...]
    balanced: bool
    note: str = ""


ToWorker = Hello | Meet | Reserve | Prefill | Cancel | Flow | Inspect
ToGateway = (
    Welcome
    | Rejected
    | Met
    | Granted
    | Refused
    | FirstToken
    | HandedOver
    | Landed
    | Tokens
    | Failed
    | Load
    | Ledger
)
