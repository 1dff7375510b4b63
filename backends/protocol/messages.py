"""What a gateway and a worker say to each other.

Unknown fields are ignored, so that neighbouring versions understand each other; a field is added
with a default, never changed. A new message goes only to a peer that speaks the version which
brought it (`greeting.py`). The gateway chooses `handle`, a number that names one request on this
connection; a sequence is `(handle, index)`. Times are durations in seconds: no two clocks are
compared.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from backends.api import BackendInfo as BackendInfo
from backends.api import Logprob as Logprob
from backends.api import Sampling as Sampling
from backends.chain import MARK_BYTES
from backends.protocol.request import Claim, Count, RequestSpec
from transfer.layout import Endpoint, KVLayout, Shard
from transfer.layout import Landing as Landing

Role = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length"]
Phase = Literal["reserve", "prefill", "handoff", "decode"]
Stage = Literal["prefilling", "landing", "decoding"]
Shards = Annotated[tuple[Shard, ...], msgspec.Meta(max_length=256)]

MOST_MARKS = 8192
"""In one message. More take several."""

Marks = Annotated[bytes, msgspec.Meta(max_length=MOST_MARKS * MARK_BYTES)]

FENCED = "fenced"
"""Code of a `Failed` to whom a request does not belong any more: it must not try again."""

NONCE_BYTES = 32
Nonce = Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)]
Mac = Annotated[bytes, msgspec.Meta(max_length=64)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Anything that travels on the control connection."""


# ---- gateway to worker ---------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First on the connection: the newest and the oldest version that the gateway speaks."""

    version: int
    gateway: Annotated[str, msgspec.Meta(max_length=128)]
    lowest: int = 1
    nonce: Nonce = b""


class Proof(Message, frozen=True):
    """Answer to `Challenge`: that the gateway knows the shared secret."""

    mac: Mac


class Meet(Message, frozen=True):
    """To a prefill worker: connect to this decode worker now, before a request needs it.

    `shards` are the heads in each of its pools, where they are several. `exact`: its continuation
    is, for all that the gateway knows.
    """

    worker: str
    incarnation: int
    layout: KVLayout
    endpoints: tuple[Endpoint, ...]
    shards: Shards = ()
    exact: bool = True


class Reserve(Message, frozen=True):
    """To a decode worker: set blocks aside for this request's prefix and answer with a landing.

    `prefill` is the worker that will write there, over `transport`; empty: any. `partial` says that
    it understands a landing that has a part of the prefix already. `sources` are the heads in each
    of its pools, where they are several.
    """

    spec: RequestSpec
    prefill: str = ""
    transport: str = ""
    partial: bool = False
    sources: Shards = ()


class Prefill(Message, frozen=True):
    """To a prefill worker: compute the prefix and hand it over into `landing`.

    Without a landing the first token is all that is wanted (`prefill`), or the same worker
    decodes on (`both`).
    """

    spec: RequestSpec
    landing: Landing | None = None
    decode_here: bool = False


class Cancel(Message, frozen=True):
    """Stop this request, or those of its sequences that `indexes` names, and free its blocks.

    What is kept under a claim keeps the tokens of sequences that are named; a cancel without
    names ends that too.
    """

    handle: int
    indexes: tuple[int, ...] | None = None


class Disown(Message, frozen=True):
    """This gateway's client has left: keep what has a claim for whoever adopts it."""

    handle: int


class Adopt(Message, frozen=True):
    """Give what is kept under `claim` to this gateway, and nobody with a lower epoch any more.

    The answer is `Adopted`, then all tokens so far. A part whose first sequence is `index` has
    the handle `handle + index` from then on; whoever had it gets `Failed` with code `FENCED`.
    """

    handle: int
    claim: Claim
    epoch: Count


class Flow(Message, frozen=True):
    """Pause one sequence, or let it go on: its client reads too slowly."""

    handle: int
    index: int
    paused: bool


class Drain(Message, frozen=True):
    """Take no new work, finish or give back the rest, and leave. `Load` says that it has begun."""


class Inspect(Message, frozen=True):
    """Ask for the ledger."""

    ticket: int


# ---- worker to gateway ---------------------------------------------------------------------


class Challenge(Message, frozen=True):
    """Answer to `Hello`."""

    nonce: Nonce


class Welcome(Message, frozen=True):
    """Answer to `Proof`: who the worker is, what its backend states, the version to speak.

    `mac` proves that it knows the shared secret too. `left_out` are transports that it should have
    had and does not offer, with the reasons. `step_tokens` is the most that it computes in one
    step; 0 when it does not say.
    """

    version: int
    worker: str
    incarnation: int
    role: Role
    info: BackendInfo
    endpoints: tuple[Endpoint, ...] = ()
    mac: Mac = b""
    left_out: dict[str, str] = {}
    step_tokens: int = 0


class Rejected(Message, frozen=True):
    """Instead of `Welcome`: why this connection is refused. The worker closes it."""

    reason: str


class Met(Message, frozen=True):
    """Answer to `Meet`: the plan in one line, or why the pair cannot be placed.

    `reason` says why this transport. Comes again, unasked, when the connection was lost.
    """

    worker: str
    transport: str = ""
    plan: str = ""
    reason: str = ""
    refusal: str = ""


class Granted(Message, frozen=True):
    """Answer to `Reserve`."""

    handle: int
    landing: Landing


class Refused(Message, frozen=True):
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


class FirstToken(Message, frozen=True):
    """From the prefill worker, before the commit; its durations in seconds.

    `first` is empty when the sequences' next tokens were already bound. The KV of the first
    `cached` tokens was there already.
    """

    handle: int
    first: tuple[First, ...]
    wait: float
    prefill: float
    prompt_logprobs: tuple[Logprob, ...] = ()
    cached: int = 0


class HandedOver(Message, frozen=True):
    """From the prefill worker, after the commit: its part in the handoff is over.

    `exposed` is the time from the last layer's being final to the last write; `overlapped` the
    time that pushing took before that.
    """

    handle: int
    bytes: int
    exposed: float
    overlapped: float
    verify: float


class Landed(Message, frozen=True):
    """From the decode worker: the prefix is verified and admitted."""

    handle: int
    verify: float


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one worker keeps of one attempt, which began under `epoch`, at some sequences.

    A prefill and a decode worker have each a part of an attempt whose handoff is under way.
    """

    handle: int
    epoch: int
    stage: Stage
    indexes: tuple[int, ...]


class Adopted(Message, frozen=True):
    """Answer to `Adopt`. An `epoch` other than 0: it is another's, who has it under that one."""

    handle: int
    epoch: int = 0
    parts: tuple[Part, ...] = ()


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `position` counts generated tokens of the sequence from 0."""

    handle: int
    index: int
    position: int
    token: int
    finish: FinishReason | None = None
    logprob: Logprob | None = None


class Tokens(Message, frozen=True):
    """All that one decode step gave to this gateway."""

    step: int
    rows: tuple[Token, ...]


class Failed(Message, frozen=True):
    """A request, or some of its sequences, ended badly here. `retry`: prefill again may help.

    `landing`: the handoff failed before the prefix was admitted.
    """

    handle: int
    phase: Phase
    code: str
    detail: str
    retry: bool
    indexes: tuple[int, ...] | None = None


class Load(Message, frozen=True):
    """How full the worker is; sent once a second and when it changes much.

    `shunned` are prefill workers that hold as much of its pool as they may, some in quarantine;
    `quarantined` counts blocks, for whomever.
    """

    free_blocks: int
    pool_blocks: int
    running: int
    waiting: int
    waiting_tokens: int
    draining: bool = False
    quarantined: int = 0
    shunned: tuple[str, ...] = ()


class Cached(Message, frozen=True):
    """Which blocks of prefixes are kept now, and which are not any more; for placement to know.

    `added` and `removed` are marks (see `chain.py`), packed. Messages are numbered without a gap;
    one that is `fresh` makes all void that was said before, and is the first on a connection.
    """

    number: int
    added: Marks = b""
    removed: Marks = b""
    fresh: bool = False


class Ledger(Message, frozen=True):
    """Answer to `Inspect`: holders, their reasons and block counts, and whether it balances.

    Idle blocks, which are kept for later prefixes and would be given up, count as free.
    """

    ticket: int
    worker: str
    pool_blocks: int
    free_blocks: int
    holders: tuple[tuple[str, str, int], ...]
    balanced: bool
    note: str = ""


ToWorker = (
    Hello | Proof | Meet | Reserve | Prefill | Cancel | Flow | Drain | Inspect | Disown | Adopt
)
ToGateway = (
    Challenge
    | Welcome
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
    | Cached
    | Ledger
    | Adopted
)
