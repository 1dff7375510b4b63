"""What a transport promises, on the sending and on the receiving side.

The decode worker runs one `Receiver` per transport; a prefill worker keeps one `Sender` per
transport, opens a `Writer` for each handoff, and pushes slices as they become final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from transfer.errors import PeerLost
from transfer.layout import Endpoint, Epoch, KVLayout, Landing, Natural, Positive
from transfer.pool import Buffer as Buffer

TOUCH_SECONDS = 0.05
"""How often a lease is renewed, at least, while something is written."""


class Source(msgspec.Struct, frozen=True):
    """A prefix in the sender's pool: `tokens` tokens that lie in `blocks`, in their order."""

    layout: KVLayout
    pool: Buffer
    pool_blocks: int
    blocks: tuple[int, ...]
    tokens: int


class KVSlice(msgspec.Struct, frozen=True):
    """The K and V of `layers` layers from `layer` on, for tokens `start` to `end` (exclusive)."""

    layer: Natural
    start: Natural
    end: Natural
    layers: Positive = 1

    def joined(self, other: KVSlice) -> KVSlice | None:
        """Both as one slice, where `other` holds the same tokens of the layers that follow."""
        if (self.start, self.end) != (other.start, other.end):
            return None
        if other.layer != self.layer + self.layers:
            return None
        return KVSlice(self.layer, self.start, self.end, self.layers + other.layers)


class Receipt(msgspec.Struct, frozen=True):
    """What a committed handoff took, in seconds of the receiver's own clock, and in bytes."""

    verify_seconds: float
    answer: bytes
    bytes: int


class Writer(Protocol):
    """The sender's end of one handoff. One task at a time uses it."""

    async def write(self, part: KVSlice) -> None:
        """Put `part` where the landing wants it, in the landing's layout.

        What of it is `Landing.present` is left out, and renews the lease all the same. When this
        raises, cancellation included, the landing holds some, all or none of the data and writes
        may still be arriving. Its blocks must not be reused until the receiver's `quiesce` returns.

        Raises:
            LandingGone: the landing expired, was cancelled, or its worker restarted.
            PeerLost: the connection broke.
        """

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """Prove that all of the prefix arrived and hand it over, once.

        Sends the digest of what was written and `note` (opaque to this package). Returns when the
        receiver has verified its pool and its owner has taken the landing with `note`;
        `Receipt.answer` is what that owner answered.

        Raises:
            DigestMismatch: the pool holds something else. The receiver has freed the landing.
            LandingGone: as in `write`.
            PeerLost: the connection broke; whether the receiver has taken the prefix is unknown.
            TimeoutError: no answer within `seconds`; likewise unknown.
        """

    async def abort(self) -> None:
        """Tell the receiver that nothing more comes. Never raises; safe after any failure.

        When this returns, this end writes no more. Afterwards the writer is of no use.
        """


class Probe(msgspec.Struct, frozen=True):
    """How fast a connection proved to be; `bytes_per_second` is 0 where nothing was moved.

    `note` is for people: what else it depends on.
    """

    bytes_per_second: float = 0.0
    round_trip_seconds: float = 0.0
    note: str = ""


class Opener(Protocol):
    """Whoever begins handoffs."""

    async def open(self, landing: Landing, source: Source) -> Writer:
        """Begin a handoff from `source` into `landing`.

        Raises:
            LayoutMismatch: the pools cannot be converted.
            PeerLost: the peer cannot be reached.
        """


class Sender(Opener, Protocol):
    """One per transport in a prefill worker: connections to decode workers, kept and warmed."""

    lost: Callable[[Endpoint, PeerLost], None]
    """Called on the event loop, once for every connection that was made and has ended.

    Whoever owns the sender sets it.
    """

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """Meet a peer before any request needs it. Returns the plan in one printable line.

        Raises:
            LayoutMismatch: the pools cannot be converted; says the first reason.
            PeerLost: nobody answers there, or it refused us.
        """

    async def probe(self, endpoint: Endpoint) -> Probe:
        """Measure the connection that was made to `endpoint`, with a few MB that reach no pool.

        A transport that cannot move bytes without a landing measures the round trip alone.

        Raises:
            PeerLost: there is no connection, or it broke.
        """

    async def close(self) -> None:
        """Close every connection. Writers that are open fail with `PeerLost`."""


def nobody_minds() -> None:
    """What a receiver calls `claimed` where nobody wants to know."""


def nobody_cares(endpoint: Endpoint, reason: PeerLost) -> None:
    """What a sender's `lost` is until somebody sets it."""


class Proof(msgspec.Struct, frozen=True):
    """What one full block of a prefix held, at its place there: its digest under `key`."""

    key: bytes
    digest: bytes


class Arrival(msgspec.Struct, frozen=True):
    """A verified prefix, offered to the owner of its landing.

    `proofs` say what each of the full blocks that were written holds; none of a landing for some
    heads, and where nothing was verified. `bytes` were written.
    """

    landing: str
    epoch: Epoch
    note: bytes
    verify_seconds: float
    bytes: int
    proofs: tuple[Proof, ...] = ()


class Receiver(Protocol):
    """One per transport in a decode worker: takes writes for landings, and for nothing else."""

    @property
    def endpoint(self) -> Endpoint:
        """Where senders reach this receiver."""

    def expect(
        self,
        landing: Landing,
        pool: Buffer,
        *,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
        claimed: Callable[[], None] = nobody_minds,
        proofs: Sequence[Proof] = (),
    ) -> None:
        """Accept writes for `landing` into `pool` from now on.

        `claimed` is called when a writer has shown its right to the landing, before its first
        write: a landing that several receivers expect has one writer all the same, so its owner
        withdraws it from the others. `touched` is called while something is written (it renews
        the lease), within `TOUCH_SECONDS` of the last call. At a commit whose digest agrees,
        `arrived` is called once; it may raise `LandingGone`, and what it returns goes back to the
        sender. At a commit whose digest disagrees, at an abort, or when the sender's connection
        is lost before the commit, `failed` is called once instead, with the reason. All run
        on the event loop. None is called after `withdraw`.

        `proofs` are those of the blocks that hold `Landing.present`, which are looked at again at
        the commit, just before they are used: damage done to them since they were kept fails the
        landing with `KeptChanged`. That costs what verifying them would have cost had they been
        sent.
        """

    def withdraw(self, landing_id: str) -> None:
        """Refuse every later write and commit for this landing. Safe to call twice."""

    async def quiesce(self, landing_id: str) -> None:
        """Return once no write for this withdrawn landing can reach the pool any more."""

    async def close(self) -> None:
        """Stop listening and close every connection."""


def whole(layers: int, tokens: int) -> Sequence[KVSlice]:
    """A prefix of `tokens` tokens as one slice per layer."""
    return [KVSlice(layer, 0, tokens) for layer in range(layers)]
