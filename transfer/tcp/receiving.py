"""Take writes over TCP straight into the pool, and verify a handoff before its owner hears of it.

`incoming.py` walks through the frames of one connection, `landings.py` decides what is allowed.
The kernel copies into the pool inside a callback of the event loop and nowhere else, so a
withdrawn landing is safe as soon as the book says so: what still comes is read into scratch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from transfer.contract import Arrival, Buffer
from transfer.errors import DigestMismatch, LandingGone, PeerLost
from transfer.landings import Expected, Landings
from transfer.layout import Endpoint, KVLayout, Landing
from transfer.tcp import wire
from transfer.tcp.incoming import SCRATCH_BYTES, Handoff, Incoming

WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 -- refused, not listened on


class TcpReceiver:
    """Listens for senders and takes what they write for the landings it was told to expect.

    `advertise` is the host name that senders are told, where it is not `host`. `stall_seconds`
    is how long a peer's machine may be silent before its connection counts as lost.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: str = "",
        advertise: str = "",
        stall_seconds: float = 10.0,
        max_connections: int = 256,
    ) -> None:
        """Prepare; `start` begins to listen.

        Raises:
            ValueError: `host` stands for every address and `advertise` names none.
        """
        if not advertise and host in WILDCARDS:
            raise ValueError(f"advertise: must be set where host is {host!r}")
        self.layout = layout
        self.secret = secret.encode()
        self.stall_seconds = stall_seconds
        self.landings = Landings(layout)
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._host, self._port, self._advertise = host, port, advertise or host
        self._max_connections = max_connections
        self._connections: set[Incoming] = set()
        self._server: asyncio.Server | None = None
        self._verifier = ThreadPoolExecutor(1, thread_name_prefix="tcp-verify")

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

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
        return wire.address(self._advertise, self._port)

    def expect(
        self,
        landing: Landing,
        pool: Buffer,
        *,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
    ) -> None:
        """As `Receiver.expect`.

        Raises:
            ValueError: it is expected already, or contradicts the pool or this layout.
        """
        self.landings.expect(landing, pool, touched, arrived, failed)

    def withdraw(self, landing_id: str) -> None:
        """As `Receiver.withdraw`; the sender is told."""
        entry = self.landings.withdraw(landing_id)
        if entry is not None and isinstance(entry.writer, Handoff):
            entry.writer.end("gone", f"landing {landing_id} was withdrawn")

    async def quiesce(self, landing_id: str) -> None:
        """As `Receiver.quiesce`: nothing can be on its way past a withdrawal, see above."""

    async def close(self) -> None:
        """Stop listening and close every connection; their landings fail with `PeerLost`."""
        if self._server is not None:
            self._server.close()
        closing = [connection.closed for connection in self._connections]
        for connection in list(self._connections):
            connection.drop()
        if closing:
            await asyncio.wait(closing, timeout=self.stall_seconds)
        self._verifier.shutdown(wait=False, cancel_futures=True)

    def verify(self, handoff: Handoff, entry: Expected, commit: wire.Commit) -> None:
        """Compute the digest in a thread, then settle the landing and answer."""
        entry.begin_verifying()
        loop = asyncio.get_running_loop()
        digest = loop.run_in_executor(self._verifier, entry.digest)
        digest.add_done_callback(partial(self._verified, handoff, entry, commit, time.monotonic()))

    def _verified(
        self,
        handoff: Handoff,
        entry: Expected,
        commit: wire.Commit,
        begun: float,
        digest: asyncio.Future[bytes],
    ) -> None:
        seconds = time.monotonic() - begun
        broken = PeerLost("closed") if digest.cancelled() else digest.exception()
        try:
            if broken is not None:
                entry.fail(broken)
                raise LandingGone(f"the pool could not be verified: {broken}")
            answer = entry.settle(digest.result(), commit.digest, commit.note, seconds)
        except DigestMismatch as error:
            handoff.end("mismatch", str(error))
        except LandingGone as error:
            handoff.end("gone", str(error))
        else:
            size = entry.landing.tokens * self.layout.token_bytes
            handoff.end("landed", verify_seconds=seconds, size=size, answer=answer)
        finally:
            self.landings.forget(entry)

    def _accept(self) -> Incoming:
        connection = Incoming(self, crowded=len(self._connections) >= self._max_connections)
        self._connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
        return connection
