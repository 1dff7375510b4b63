"""Meet a receiver: connect, be welcomed, and make what the transport will need.

All of it happens in a thread of its own, which may block; what it brings after its caller has
given up, it closes itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from functools import partial

import msgspec

from transfer.errors import PeerLost, PeerMisbehaved
from transfer.layout import Endpoint
from transfer.plan import Plan
from transfer.session import wire
from transfer.session.greeting import Denial, Talk, greet
from transfer.session.mover import Carrier, Met, Mover


class Acquaintance(msgspec.Struct, frozen=True):
    """A receiver that has welcomed us. `digest` is whether it verifies commits.

    It takes us for lost after `patience_seconds` of silence.
    """

    connection: socket.socket
    mover: Mover
    digest: bool
    patience_seconds: float

    def drop(self) -> None:
        """Close it, where nobody wants it any more."""
        self.mover.cut()
        self.mover.close()
        self.connection.close()


class Caller(msgspec.Struct, frozen=True):
    """Whoever wants to meet receivers, how long that may take, and how long they may be silent."""

    carrier: Carrier
    secret: bytes
    tls: ssl.SSLContext | None
    seconds: float
    patience_seconds: float

    async def meet(self, endpoint: Endpoint, agreed: Plan) -> Acquaintance:
        """Meet the receiver at `endpoint`, to move there what was `agreed`.

        Raises:
            PeerLost: nobody answers in time, or it refused us.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Acquaintance] = loop.create_future()
        thread = threading.Thread(
            target=self._attempt,
            args=(loop, result, endpoint, agreed),
            name=f"kv-meet-{endpoint.address}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # there is no memory for one
            raise PeerLost(f"{endpoint.address} cannot be met: {error}") from error
        try:
            async with asyncio.timeout(self.seconds):
                return await result
        except TimeoutError as error:
            raise PeerLost(f"{endpoint.address} did not welcome us in time") from error

    # ---- in the thread ----------------------------------------------------------------------

    def _attempt(
        self,
        loop: asyncio.AbstractEventLoop,
        result: asyncio.Future[Acquaintance],
        endpoint: Endpoint,
        agreed: Plan,
    ) -> None:
        outcome: Acquaintance | Exception
        try:
            outcome = self._meet(endpoint, agreed)
        except Exception as error:
            outcome = error
        try:
            loop.call_soon_threadsafe(_deliver, result, outcome)
        except RuntimeError:  # the loop has ended
            _drop(outcome)

    def _meet(self, endpoint: Endpoint, agreed: Plan) -> Acquaintance:
        where = endpoint.address
        try:
            connection = self._reach(endpoint)
        except TimeoutError as error:
            raise PeerLost(f"{where} did not answer in time") from error
        except OSError as error:
            raise PeerLost(f"{where} cannot be reached: {error}") from error
        except ValueError as error:
            raise PeerLost(str(error)) from error
        try:
            return self._greet(endpoint, connection, agreed)
        except BaseException:
            connection.close()
            raise

    def _greet(self, endpoint: Endpoint, connection: socket.socket, agreed: Plan) -> Acquaintance:
        talk = Talk(connection, self.seconds)
        fds: list[int] = talk.fds
        try:
            hello = self.carrier.hello(endpoint)
            welcome, theirs = greet(talk, self.secret, agreed, hello, self.patience_seconds)
            join = partial(self._join, endpoint, welcome.token)
            met = Met(endpoint, connection, welcome.blob, tuple(fds), join)
            fds = []  # the carrier's from here on
            return Acquaintance(connection, self.carrier.meet(met), welcome.digest, theirs)
        except Denial as denial:
            raise PeerLost(f"{endpoint.address} refused us: {denial}") from denial
        except TimeoutError as error:
            raise PeerLost(f"{endpoint.address} did not welcome us in time") from error
        except PeerMisbehaved as error:
            raise PeerLost(f"{endpoint.address} misbehaved: {error}") from error
        except (OSError, MemoryError) as error:
            raise PeerLost(f"{endpoint.address} did not welcome us: {error!r}") from error
        finally:
            for fd in fds:
                os.close(fd)

    def _join(self, endpoint: Endpoint, token: bytes) -> socket.socket:
        connection = self._reach(endpoint)
        try:
            Talk(connection, self.seconds).say(wire.Join(token))
        except BaseException:
            connection.close()
            raise
        connection.settimeout(self.seconds)
        return connection

    def _reach(self, endpoint: Endpoint) -> socket.socket:
        """A connection to the endpoint, encrypted where it must be."""
        connection = self.carrier.dial(endpoint, self.seconds)
        connection.settimeout(self.seconds)
        if self.tls is None:
            return connection
        try:
            return self.tls.wrap_socket(connection)
        except BaseException:
            connection.close()
            raise


def _deliver(result: asyncio.Future[Acquaintance], outcome: Acquaintance | Exception) -> None:
    if result.done():
        _drop(outcome)
    elif isinstance(outcome, Exception):
        result.set_exception(outcome)
    else:
        result.set_result(outcome)


def _drop(outcome: Acquaintance | Exception) -> None:
    if isinstance(outcome, Acquaintance):
        outcome.drop()
