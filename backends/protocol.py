"""The messages between a gateway and a worker: MessagePack in length-prefixed frames.

A frame is a 4-byte big-endian length, then one message. Unknown fields are ignored, so that
neighbouring versions understand each other; a field is added, never changed. The gateway
chooses `handle`, a number that names one request on this connection; a sequence is
`(handle, index)`. Times are durations in seconds: no two clocks are compared.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from backends.api import BackendInfo as BackendInfo
from backends.api import Logprob as Logprob
from backends.api import Sampling as Sampling
from backends.chain import chain as chain
from backends.chain import mark as mark
from backends.errors import ProtocolError
from transfer.layout import Endpoint, KVLayout
from transfer.layout import Landing as Landing

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
LENGTH = struct.Struct(">I")

TokenIds = Annotated[list[int], msgspec.Meta(max_length=1 << 20)]
Role = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length"]
Phase = Literal["reserve", "prefill", "handoff", "decode"]


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

    KV of full blocks is kept for, and taken from, requests with the same `salt` (see `chain.py`);
    without one it is neither.
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

    @property
    def prefix(self) -> list[int]:
        """The tokens whose KV is handed over."""
        generated = self.sequences[0].generated
        return self.prompt + generated[:-1]


# ---- gateway to worker ---------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First on the connection, with the shared secret (empty when none is set)."""

    version: int
    gateway: str
    secret: str = ""


class Meet(Message, frozen=True):
    """To a prefill worker: connect to this decode worker now, before a request needs it."""

    worker: str
    incarnation: int
    layout: KVLayout
    endpoints: tuple[Endpoint, ...]


class Reserve(Message, frozen=True):
    """To a decode worker: set blocks aside for this request's prefix and answer with a landing.

    `prefill` is the worker that will write there, over `transport`; empty: any.
    """

    spec: RequestSpec
    prefill: str = ""
    transport: str = ""


class Prefill(Message, frozen=True):
    """To a prefill worker: compute the prefix and hand it over into `landing`.

    Without a landing the first token is all that is wanted (`prefill`), or the same worker
    decodes on (`both`).
    """

    spec: RequestSpec
    landing: Landing | None = None
    decode_here: bool = False


class Cancel(Message, frozen=True):
    """Stop this request, or those of its sequences that `indexes` names, and free its blocks."""

    handle: int
    indexes: tuple[int, ...] | None = None


class Flow(Message, frozen=True):
    """Pause one sequence, or let it go on: its client reads too slowly."""

    handle: int
    index: int
    paused: bool


class Inspect(Message, frozen=True):
    """Ask for the ledger."""

    ticket: int


# ---- worker to gateway ---------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """First from the worker: who it is and what its backend states."""

    version: int
    worker: str
    incarnation: int
    role: Role
    info: BackendInfo
    endpoints: tuple[Endpoint, ...] = ()


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

    `first` is empty when the sequences' next tokens were already bound.
    """

    handle: int
    first: tuple[First, ...]
    wait: float
    prefill: float
    prompt_logprobs: tuple[Logprob, ...] = ()


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

    `shunned` are prefill workers that hold too much of its pool in quarantine to be given more;
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


class Ledger(Message, frozen=True):
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


# ---- framing -------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder raises: for text that is no UTF-8 and for deep nesting, Python's own errors."""


def frame(message: Message) -> bytes:
    """`message` as it travels."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


class Link(asyncio.Protocol):
    """One control connection: messages in by callback, in order; messages out by `send`.

    `lost` is called once, with the reason, when the connection has ended for whatever cause; no
    message is delivered after it. A peer that sends garbage is disconnected, and so is one that
    lets `MAX_UNSENT_BYTES` pile up. `message` may be replaced: the next one goes elsewhere.
    """

    MAX_UNSENT_BYTES = 64 * 1024 * 1024

    def __init__(
        self,
        accepts: Any,
        message: Callable[[Link, Any], None],
        lost: Callable[[Link, str], None],
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(accepts)
        self._lost = lost
        self._rest = b""
        self.message = message
        self._transport: asyncio.Transport | None = None
        self._reason = "the peer closed the connection"
        self._ended = False

    def send(self, message: Message) -> None:
        """Queue `message`; dropped in silence once the connection is lost (`lost` has told)."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() > self.MAX_UNSENT_BYTES:
            self.abort("the peer does not read")
            return
        transport.write(frame(message))

    def close(self) -> None:
        """Send what is queued, then end the connection."""
        self._ended = True
        if self._transport is not None:
            self._reason = "we closed the connection"
            self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport  # uvloop's class is no asyncio.Transport, it only behaves so

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        decode, until, start = self._decoder.decode, len(data), LENGTH.size
        # One loop and no helpers: most frames are one token, and this is what each of them costs.
        try:
            while start <= until and not self._ended:
                (length,) = LENGTH.unpack_from(data, start - LENGTH.size)
                if length > MAX_FRAME_BYTES:
                    raise ProtocolError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
                end = start + length
                if end > until:
                    break
                self.message(self, decode(data[start:end]))
                start = end + LENGTH.size
        except (ProtocolError, *UNREADABLE) as error:
            self.abort(f"the peer sent what it must not: {error}")
        self._rest = data[start - LENGTH.size :]

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._transport = None
        self._lost(self, str(exc) if exc else self._reason)

    def abort(self, reason: str) -> None:
        """End the connection at once, whatever is still unsent."""
        self._ended = True
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()
