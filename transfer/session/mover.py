"""What a transport adds to the session, at each end: how bytes reach a landing.

A transport is a `Carrier` (one per `SessionSender`) and an `Intake` (one per `SessionReceiver`).
Who calls what, in which thread:

    sending end                                     receiving end
    Carrier.dial    dialling thread                 Intake.listen     event loop, once
    Carrier.meet    dialling thread -> Mover        Intake.welcome    the connection's thread
    Mover.begin     event loop      -> Move         Intake.join       the connection's thread
    Move.write      the session's moving thread     Intake.prepare    event loop
    Move.settle     the session's moving thread     Intake.complete   event loop
    Move.release    the session's moving thread     Intake.stopped    event loop
    Mover.probe     the session's moving thread     Intake.acknowledged  event loop
    Mover.cut       event loop                      Intake.parted     event loop
    Mover.close     the session's moving thread     Intake.close      event loop

The moving thread does one thing after the other, so that nothing of a `Move` overlaps with
another call to it. The bad cases are in the docstrings; `check_transport` plays them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import msgspec

from transfer.contract import KVSlice, Source
from transfer.convert import Tamper
from transfer.digest import PrefixDigest
from transfer.layout import Endpoint, Landing
from transfer.plan import Plan
from transfer.session.handoff import Handoff, Peer

# ---- the sending end ---------------------------------------------------------------------------


class Met(msgspec.Struct, frozen=True):
    """What the receiver's half of a transport said when it welcomed us.

    `fds` came with it over a Unix socket; they are the carrier's, which closes them, also when
    `meet` raises. `join` opens a further connection of the same session, greeted and blocking
    with a time limit; raises OSError.
    """

    endpoint: Endpoint
    connection: socket.socket
    blob: bytes
    fds: tuple[int, ...]
    join: Callable[[], socket.socket]


class Outgoing(msgspec.Struct, frozen=True):
    """One handoff as the sending half sees it.

    A `digest` must be given each part that is written, best while its bytes are in the cache.
    `over` answers, in any thread, whether nobody wants its bytes any more: look at it between
    pieces of about a megabyte. `tamper` is for drills: show it each frame before it is moved.
    """

    ticket: int
    plan: Plan
    source: Source
    landing: Landing
    digest: PrefixDigest | None
    over: Callable[[], bool]
    tamper: Tamper | None


class Move(Protocol):
    """The bytes of one handoff on their way. All of it runs in the session's moving thread."""

    def write(self, part: KVSlice) -> None:
        """Have the bytes of `part` brought to where the landing wants them; blocks.

        May return before they have landed, but not before they may be read from the source no
        more. Adds `part` to `Outgoing.digest`. Returns early, no matter with what left undone,
        once `Outgoing.over`. `part` has been checked; each is written once.

        Raises:
            OSError: the peer cannot be written to any more; the whole session is lost.
        """

    def settle(self) -> bytes:
        """Once, after the last write: what `Intake.complete` needs to know that all has landed.

        A transport whose writes the receiver cannot see (shared memory, RDMA) waits here until
        every one of them has landed and returns nothing.

        Raises:
            OSError: as in `write`.
        """

    def release(self) -> None:
        """Return once no write of this handoff can land through this end any more. Never raises.

        Called exactly once, last, whatever came before: after a commit that was answered, an
        abort, a withdrawal by the receiver, the loss of the session, a `write` that raised. The
        receiver is told afterwards, and gives the blocks to somebody else: a write that cannot be
        called off must be waited for, however long it takes.
        """


class Mover(Protocol):
    """How bytes reach one peer; as long as its session lasts."""

    waits_for_grant: bool
    """Whether nothing may be written before the receiver knows the writer.

    True where the receiver does not check each write (shared memory, RDMA): a landing that was
    withdrawn before it heard of a writer has nobody to wait for.
    """

    def begin(self, outgoing: Outgoing) -> Move:
        """Prepare a handoff; does not block and moves nothing.

        Raises:
            ValueError: pool, blocks and tokens of the source contradict each other.
            PeerMisbehaved: those of the landing do.
        """

    def probe(self) -> float:
        """Bytes per second on the way to the peer, by a few MB that reach no pool; blocks.

        0 where a transport cannot move bytes without a landing.

        Raises:
            OSError: as in `Move.write`.
        """

    def cut(self) -> None:
        """The session is lost or closing: have a call that blocks in the moving thread fail soon.

        Does not block. Called once, before the last `release`.
        """

    def close(self) -> None:
        """Let go of everything, after the last `release`. Never raises."""


class Carrier(Protocol):
    """The sending half of a transport: reaches endpoints of its kind."""

    transport: str
    """As in `Endpoint.transport`."""

    def dial(self, endpoint: Endpoint, seconds: float) -> socket.socket:
        """Connect a stream socket to `endpoint`, within `seconds`; blocks.

        Raises:
            OSError: nobody answers there.
            ValueError: it is not an address of this transport.
        """

    def hello(self, endpoint: Endpoint) -> bytes:
        """What `Intake.welcome` is told of us, at most `wire.MAX_BLOB_BYTES`."""

    def meet(self, met: Met) -> Mover:
        """Make everything that handoffs to this peer will need, so that none waits for it; blocks.

        Raises:
            OSError: the peer cannot be reached in this transport's own way.
            PeerMisbehaved: its blob makes no sense.
        """

    def close(self) -> None:
        """After the last mover was closed."""


# ---- the receiving end -------------------------------------------------------------------------


class Offer(msgspec.Struct, frozen=True):
    """What a sender is welcomed with.

    `fds` are sent along over a Unix socket and stay the intake's.
    """

    blob: bytes = b""
    fds: tuple[int, ...] = ()


class Intake(Protocol):
    """The receiving half of a transport: sees to it that bytes land where they may."""

    def listen(self) -> tuple[socket.socket, Endpoint]:
        """A socket that listens (the session accepts and closes it), and where it is reached.

        Raises:
            OSError: it cannot be listened there.
        """

    def welcome(self, peer: Peer, hello: bytes) -> Offer:
        """A sender has proven that it knows the secret: what will it need? May block a little.

        Raises:
            PeerMisbehaved: its hello makes no sense; the reason is sent to it.
        """

    def join(self, peer: Peer, connection: socket.socket) -> None:
        """Serve a further connection of a session until it ends; it is closed afterwards.

        `close` and `parted` must make it return.

        Raises:
            PeerMisbehaved: these bytes the transport does not allow; the session is dropped.
            OSError: the connection broke; likewise.
        """

    def prepare(self, handoff: Handoff) -> None:
        """A writer has shown its right to a landing; its bytes, if any, come from now on."""

    def complete(self, handoff: Handoff, proof: bytes, then: Callable[[], None]) -> None:
        """Call `then`, on the event loop, once all that `Move.settle` stated has landed.

        At once if it has. Never once the landing is over (`Handoff.live` is None).

        Raises:
            PeerMisbehaved: the proof makes no sense.
        """

    def stopped(self, handoff: Handoff) -> None:
        """The landing takes no more writes, though its writer may not know it yet.

        An intake that checks each write itself calls `handoff.released` here, or as soon as the
        write that is under way has ended. Elsewhere the sender's word is needed.
        """

    def acknowledged(self, handoff: Handoff) -> None:
        """The sender says that its `Move.release` has returned; `stopped` was called before.

        Call `handoff.released` unless something of it may still be on its way at this end.
        """

    def parted(self, peer: Peer, handoffs: list[Handoff]) -> None:
        """The session's connection is closed; no acknowledgement comes any more.

        Call `released` of each of `handoffs` once it is *proven* that none of its writes can
        land: a closed socket proves nothing where the sender writes into the pool by itself.
        What cannot be proven stays in quarantine.
        """

    async def close(self) -> None:
        """Let go of everything. Every peer has parted."""
