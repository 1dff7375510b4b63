"""Welcome senders, and verify a handoff before its owner hears of it.

Each connection is greeted in a thread of its own, which may block; a session that was welcomed
then lives on the event loop (`incoming.py`), what joins it stays with the transport's intake.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import msgspec
import structlog

from transfer.contract import Arrival, Buffer, Proof, nobody_minds
from transfer.errors import (
    DigestMismatch,
    LandingGone,
    LayoutMismatch,
    PeerLost,
    PeerMisbehaved,
    TransferError,
)
from transfer.landings import Expected, Landings, total
from transfer.layout import Endpoint, KVLayout, Landing
from transfer.plan import check_weights
from transfer.session import greeting, wire
from transfer.session.greeting import Denial, Talk
from transfer.session.handoff import Handoff
from transfer.session.incoming import Incoming
from transfer.session.mover import Intake

TOKEN_BYTES = 32
VERIFIERS = 2
"""Threads that verify; a prefix of at least `SHARED_BYTES` is shared by them."""

SHARED_BYTES = 8 << 20
SMALL_BYTES = 4 << 20
"""Less than this is verified on the event loop: it takes less time than a turn of a thread."""

PAUSE_SECONDS = 0.5
"""How long nothing is accepted after the process ran out of descriptors."""

log = structlog.get_logger(__name__)


class SessionReceiver:
    """A `Receiver` on any stream socket; `intake` is the transport.

    `stall_seconds` is how long a peer may be silent before it counts as lost, and how long it
    may take to greet. `tls` is a server's context. Without `digest`, commits are not verified:
    for measurements only. `shard` is set by whoever has receivers for several pools, `codes` by who
    has one for codes: how its endpoint calls the transport, and how fast they are decoded,
    `allow_unlike_weights` by whose operator takes KV that other weights computed.
    """

    def __init__(
        self,
        layout: KVLayout,
        intake: Intake,
        *,
        secret: str = "",
        tls: ssl.SSLContext | None = None,
        stall_seconds: float = 10.0,
        max_connections: int = 256,
        digest: bool = True,
    ) -> None:
        """Prepare; `start` begins to listen."""
        self.layout = layout
        self.intake = intake
        self.stall_seconds = stall_seconds
        self.landings = Landings(layout)
        self.shard = 0
        self.codes: tuple[str, float] | None = None
        self.allow_unlike_weights = False
        self._secret = secret.encode()
        self._tls = tls
        self._max_connections = max_connections
        self._digest = digest
        self._listener: socket.socket | None = None
        self._endpoint: Endpoint | None = None
        self._sessions: dict[bytes, Incoming] = {}
        self._connections: dict[asyncio.Future[None], socket.socket] = {}
        self._writers: dict[str, set[Handoff]] = {}
        self._verifier = ThreadPoolExecutor(VERIFIERS, thread_name_prefix="kv-verify")

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._loop = asyncio.get_running_loop()
        self._listener, self._endpoint = self.intake.listen()
        # All threads begin now, while there is room for them.
        meeting = threading.Barrier(VERIFIERS, timeout=self.stall_seconds)
        await asyncio.gather(
            *(self._loop.run_in_executor(self._verifier, meeting.wait) for _ in range(VERIFIERS))
        )
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def endpoint(self) -> Endpoint:
        """Where senders reach this receiver, once it listens."""
        if self._endpoint is None:
            raise RuntimeError("not started")
        endpoint = msgspec.structs.replace(self._endpoint, shard=self.shard)
        if self.codes is None:
            return endpoint
        name, decodes = self.codes
        return msgspec.structs.replace(endpoint, transport=name, decodes_per_second=decodes)

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
        """As `Receiver.expect`.

        Raises:
            ValueError: it is expected already, or contradicts the pool or this layout.
        """
        self.landings.expect(landing, pool, touched, arrived, failed, claimed, proofs)

    def withdraw(self, landing_id: str) -> None:
        """As `Receiver.withdraw`; the sender is told."""
        entry = self.landings.withdraw(landing_id)
        if entry is not None and isinstance(entry.writer, Handoff):
            entry.writer.end("gone", f"landing {landing_id} was withdrawn")
            self.intake.stopped(entry.writer)

    async def quiesce(self, landing_id: str) -> None:
        """As `Receiver.quiesce`: waits for the acknowledgement, or the transport's own proof."""
        while writers := self._writers.get(landing_id):
            await asyncio.wait([it.quiet for it in writers])

    async def close(self) -> None:
        """As `Receiver.close`; landings fail with `PeerLost`."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._end_sessions()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # its thread wakes up and ends
                connection.shutdown(socket.SHUT_RDWR)
        if self._connections:
            await asyncio.wait(self._connections, timeout=self.stall_seconds)
        self._end_sessions()  # those that were being welcomed
        await self.intake.close()
        self._verifier.shutdown(wait=False, cancel_futures=True)

    def _end_sessions(self) -> None:
        for incoming in list(self._sessions.values()):
            incoming.end(PeerLost("this receiver was closed"))

    # ---- greeting ---------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors: it would be tried again at once, for ever
            log.warning("connection.refused", reason=str(error))
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(PAUSE_SECONDS, self._accept_again)
            return
        if len(self._connections) + len(self._sessions) >= self._max_connections:
            connection.setblocking(False)
            with contextlib.suppress(OSError), connection:
                connection.send(wire.frame(wire.Denied("too many connections")))
            return
        ended: asyncio.Future[None] = self._loop.create_future()
        self._connections[ended] = connection
        ended.add_done_callback(self._connections.pop)
        thread = threading.Thread(
            target=self._serve, args=(connection, ended), name="kv-receive", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # there is no memory for one
            log.warning("connection.refused", reason=str(error))
            connection.close()
            ended.set_result(None)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _serve(self, connection: socket.socket, ended: asyncio.Future[None]) -> None:
        """In a thread: greet a connection, and let the transport have it if it joins a session."""
        kept = False
        try:
            connection.settimeout(self.stall_seconds)
            if self._tls is not None:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                self._connections[ended] = connection
                connection.do_handshake()
            kept = self._greet(connection)
        except (OSError, MemoryError, PeerMisbehaved) as error:
            log.warning("connection.lost", reason=str(error) or type(error).__name__)
        finally:
            if not kept:
                connection.close()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(ended.set_result, None)

    def _greet(self, connection: socket.socket) -> bool:
        """Whether the connection is a session's now."""
        talk = Talk(connection, self.stall_seconds)
        try:
            first = talk.hear_any()
            if isinstance(first, wire.Hello):
                return self._welcome(talk, first, connection)
            if not isinstance(first, wire.Join):
                raise PeerMisbehaved(f"{type(first).__name__} before Hello")
            session = self._sessions.get(first.token)
            if session is None:
                raise Denial("no such session")
        except Denial as denial:
            log.warning("peer.refused", reason=str(denial))
            talk.say(wire.Denied(str(denial)))
            return False
        finally:
            talk.drop_fds()
        self._join(session, connection)
        return False

    def _judge(self, weights: str) -> None:
        """Refuse who would send KV of other weights; a worker that names none was its own judge."""
        if self.allow_unlike_weights or not weights:
            return
        try:
            check_weights(weights, self.layout.weights)
        except LayoutMismatch as error:
            raise Denial(str(error)) from error

    def _welcome(self, talk: Talk, hello: wire.Hello, connection: socket.socket) -> bool:
        ours = self.stall_seconds
        blob = greeting.challenge(talk, hello, self._secret, self.layout.fingerprint, ours)
        self._judge(hello.weights)
        token = secrets.token_bytes(TOKEN_BYTES)
        theirs = hello.patience_seconds or ours
        incoming = Incoming(self, connection, self._loop, token, theirs)
        try:
            offer = self.intake.welcome(incoming, blob)
        except PeerMisbehaved as error:
            raise Denial(str(error)) from error
        self._sessions[token] = incoming
        try:
            message = wire.Welcome(b"", token, self._digest, offer.blob)
            greeting.welcome(talk, self._secret, message, offer.fds)
        except (OSError, MemoryError) as error:
            incoming.drop(error)
            raise
        self._loop.call_soon_threadsafe(incoming.start)
        return True

    def _join(self, session: Incoming, connection: socket.socket) -> None:
        try:
            self.intake.join(session, connection)
        except TransferError as error:
            session.drop(error)
        except (OSError, MemoryError) as error:
            session.drop(PeerLost(f"a connection broke: {error or 'no memory'}"))
        else:
            session.drop(PeerLost("the sender closed a connection"))

    # ---- what sessions ask ------------------------------------------------------------------

    def claimed(self, handoff: Handoff) -> None:
        """From now on `quiesce` of its landing waits for this handoff."""
        assert handoff.entry is not None
        landing_id = handoff.entry.landing.id
        self._writers.setdefault(landing_id, set()).add(handoff)
        handoff.quiet.add_done_callback(lambda _: self._forget_writer(landing_id, handoff))

    def prepare(self, handoff: Handoff) -> None:
        """Make ready, before anything arrives, what would take its time afterwards."""
        self.intake.prepare(handoff)
        entry = handoff.live
        small = entry is not None and entry.moved_bytes < SMALL_BYTES
        if entry is not None and small and self._digest and handoff.summed is None:
            entry.prepare()

    def _forget_writer(self, landing_id: str, handoff: Handoff) -> None:
        writers = self._writers[landing_id]
        writers.discard(handoff)
        if not writers:
            del self._writers[landing_id]

    def left(self, incoming: Incoming) -> None:
        """The session has ended."""
        self._sessions.pop(incoming.token, None)

    def verify(self, handoff: Handoff, entry: Expected, commit: wire.Commit) -> None:
        """Have the digest, which may take a thread its time; then settle the landing and answer."""
        entry.begin_verifying()
        begun = time.monotonic()
        summed = handoff.summed.digest() if handoff.summed is not None else None
        present = entry.landing.present
        if not self._digest or (summed is not None and not present):
            self._settle(handoff, entry, commit, begun, summed)
            return
        tokens = entry.landing.tokens if summed is None else present
        compute = entry.digest if summed is None else entry.digest_of_present
        size = tokens * self.layout.token_bytes
        found = self._found(compute, size)
        told = handoff, entry, commit, begun, summed
        found.add_done_callback(partial(self._verified, *told))

    def _found(
        self, compute: Callable[[int, int], bytes], size: int
    ) -> asyncio.Future[list[bytes]]:
        """What `compute` gives for each of its shares, together about `size` bytes of memory."""
        if size < SMALL_BYTES:
            found: asyncio.Future[list[bytes]] = self._loop.create_future()
            try:
                found.set_result([compute(0, 1)])
            except Exception as error:  # as a thread would
                found.set_exception(error)
            return found
        shares = 1 if size < SHARED_BYTES else VERIFIERS
        return asyncio.gather(
            *(
                self._loop.run_in_executor(self._verifier, compute, number, shares)
                for number in range(shares)
            )
        )

    def _verified(
        self,
        handoff: Handoff,
        entry: Expected,
        commit: wire.Commit,
        begun: float,
        summed: bytes | None,
        found: asyncio.Future[list[bytes]],
    ) -> None:
        broken = PeerLost("closed") if found.cancelled() else found.exception()
        if broken is None:
            shares = found.result() if summed is None else [summed, *found.result()]
            self._settle(handoff, entry, commit, begun, total(shares))
            return
        entry.fail(broken)
        handoff.end("gone", f"the pool could not be verified: {broken}")
        handoff.released()
        self.landings.forget(entry)

    def _settle(
        self,
        handoff: Handoff,
        entry: Expected,
        commit: wire.Commit,
        begun: float,
        found: bytes | None,
    ) -> None:
        """End a landing that was verified, and answer."""
        seconds = time.monotonic() - begun
        try:
            answer = entry.settle(found, commit.digest, commit.seal, commit.note, seconds)
        except DigestMismatch as error:
            handoff.end("mismatch", str(error))
        except LandingGone as error:
            handoff.end("gone", str(error))
        else:
            moved = entry.moved_bytes
            handoff.end("landed", verify_seconds=seconds, size=moved, answer=answer)
        finally:
            handoff.released()  # whatever was written had landed before it was verified
            self.landings.forget(entry)
