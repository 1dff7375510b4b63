"""What the two ends of a session say to each other, and how long it may be.

A frame is a big-endian 32-bit length and a MessagePack message of that length. The first frames
are the greeting (`greeting.py`):

    sender    Hello ->            -> Proof ->
    receiver            Challenge            -> Welcome, or at any time Denied

A further connection of the same session begins with `Join` instead and is the transport's from
there on. After the welcome, a `ticket` is the number by which the sender names one handoff, from
0 up by one; `Open` shows the right to its landing once:

    sender    Open -> Touch -> .. -> Commit ->                     Open -> .. -> Released
    receiver        (Granted)                 Answer: landed              Answer: gone ->  (unasked)

Both ends say `Alive` when they have nothing else to say, as often as the other one wants to hear
it: each states in its first message how long a silence it bears.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal, TypeVar

import msgspec

from transfer.errors import PeerMisbehaved
from transfer.layout import Epoch, Natural

VERSION = 4
PREFIX = struct.Struct(">I")

MAX_NOTE_BYTES = 4 << 20
MAX_BLOB_BYTES = 4 << 20
MAX_MESSAGE_BYTES = MAX_NOTE_BYTES + (64 << 10)
MAX_STRANGER_BYTES = 4 << 10
MAX_HELLO_BYTES = MAX_STRANGER_BYTES + MAX_BLOB_BYTES
MAX_TICKETS = 4096
MAX_DETAIL = 4096
MIN_PATIENCE_SECONDS = 0.02
"""Nobody may want to hear from us more often than this and `stream.BEATS` say."""

LandingId = Annotated[str, msgspec.Meta(max_length=64)]
Detail = Annotated[str, msgspec.Meta(max_length=MAX_DETAIL)]
Short = Annotated[bytes, msgspec.Meta(max_length=64)]
Note = Annotated[bytes, msgspec.Meta(max_length=MAX_NOTE_BYTES)]
Blob = Annotated[bytes, msgspec.Meta(max_length=MAX_BLOB_BYTES)]
Patience = Annotated[float, msgspec.Meta(ge=MIN_PATIENCE_SECONDS, le=86400)]
Outcome = Literal["landed", "gone", "mismatch"]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Anything that travels in a frame."""


class Hello(Message, frozen=True):
    """First from the sender: which protocol, the layout it expects, a random number, its weights.

    A receiver of which nothing is heard for `patience_seconds` is lost to it; None: as long as the
    receiver bears it. `weights` are those that the KV was computed with; empty from a worker that
    does not say.
    """

    version: int
    fingerprint: Annotated[str, msgspec.Meta(max_length=64)]
    nonce: Short
    patience_seconds: Patience | None = None
    weights: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Challenge(Message, frozen=True):
    """Answer to `Hello`: another random number, and how long the receiver bears silence."""

    nonce: Short
    patience_seconds: Patience | None = None


class Proof(Message, frozen=True):
    """That the sender knows the workers' secret, and what its transport wants to say."""

    mac: Short
    blob: Blob


class Welcome(Message, frozen=True):
    """That the receiver knows it too; by which `token` further connections join the session.

    `digest` says whether commits are verified here, `blob` is the transport's. On a Unix socket,
    file descriptors may come with this frame.
    """

    mac: Short
    token: Short
    digest: bool
    blob: Blob


class Denied(Message, frozen=True):
    """Instead of anything else before the welcome: why not. The receiver closes."""

    reason: Detail


class Join(Message, frozen=True):
    """First on a further connection of a session that was welcomed."""

    token: Short


class Open(Message, frozen=True):
    """Begin to write into a landing, under `ticket`.

    `ask` wants `Granted` before anything is written, because the receiver cannot check a write:
    it checks instead that `place` is the landing's (see `Landing.place`).
    """

    ticket: Natural
    landing: LandingId
    epoch: Epoch
    secret: Short
    ask: bool
    place: Short = b""


class Granted(Message, frozen=True):
    """The landing is this ticket's: from now on a withdrawal waits for its `Released`."""

    ticket: Natural


class Touch(Message, frozen=True):
    """Something was written under this ticket: its lease begins anew."""

    ticket: Natural


class Commit(Message, frozen=True):
    """All has been written; by `proof` the transport's other half knows when it has arrived.

    Compare this digest with the pool and hand the prefix over, with `note`; `seal` (see
    `digest.seal`) shows that both are as they were sent.
    """

    ticket: Natural
    digest: Short
    seal: Short
    proof: Blob
    note: Note


class Released(Message, frozen=True):
    """Nothing more can land under this ticket.

    It was given up, or its landing was withdrawn; where `lost`, the session ends with it.
    """

    ticket: Natural
    lost: bool


class Answer(Message, frozen=True):
    """How a handoff ended: after `Commit`, or unasked when its landing is gone."""

    ticket: Natural
    outcome: Outcome
    detail: Detail = ""
    verify_seconds: float = 0.0
    size: int = 0
    answer: Note = b""


class Echo(Message, frozen=True):
    """To be said back as it is."""

    number: Natural


class Alive(Message, frozen=True):
    """Nothing else to say."""


Greeting = Hello | Challenge | Proof | Welcome | Denied | Join
ToReceiver = Open | Touch | Commit | Released | Echo | Alive
ToSender = Granted | Answer | Echo | Alive

Kind = TypeVar("Kind")

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What a decoder raises: for text that is no UTF-8 and for deep nesting, Python's own errors."""

_encoder = msgspec.msgpack.Encoder()
_greeting: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_to_sender: msgspec.msgpack.Decoder[ToSender] = msgspec.msgpack.Decoder(ToSender)


def frame(message: Message) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return PREFIX.pack(len(body)) + body


def greeting(body: bytes | bytearray | memoryview) -> Greeting:
    """Decode what is said before the welcome.

    Raises:
        PeerMisbehaved: it is not one of the messages.
    """
    return _decoded(_greeting, body)


def to_receiver(body: bytes | bytearray | memoryview) -> ToReceiver:
    """Decode what a sender said; raises as `greeting`."""
    return _decoded(_to_receiver, body)


def to_sender(body: bytes | bytearray | memoryview) -> ToSender:
    """Decode what a receiver said; raises as `greeting`."""
    return _decoded(_to_sender, body)


def _decoded(decoder: msgspec.msgpack.Decoder[Kind], body: bytes | bytearray | memoryview) -> Kind:
    try:
        return decoder.decode(body)
    except UNREADABLE as error:
        raise PeerMisbehaved(f"not a message: {error}") from error
