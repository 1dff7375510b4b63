"""Messages over a connection that was greeted: heard on the event loop, sent from any thread.

The socket may be TCP, Unix or TLS. A message leaves in the thread that sends it wherever the
kernel takes it at once, so that neither end of a handoff waits for a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable

from transfer.errors import PeerLost, PeerMisbehaved, TransferError
from transfer.session import wire

READ_BYTES = 256 << 10
MAX_UNSENT_BYTES = 4 * wire.MAX_NOTE_BYTES
BEATS = 4
"""How often `Alive` is said in the time after which the more impatient end gives up."""

_LATER = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Stream:
    """One connection in use. Ends once, with a reason."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        stall_seconds: float,
        peer_stall_seconds: float,
        hear: Callable[[bytes], None],
        lost: Callable[[TransferError], None],
    ) -> None:
        """Own `connection` from now on; `hear` gets the body of each message, `lost` the end.

        Both are called on the event loop, `lost` once; what `hear` raises of `PeerMisbehaved`
        ends the connection. A peer that says nothing for `stall_seconds` is lost, and so are we
        to it after `peer_stall_seconds`.
        """
        self.ended: TransferError | None = None
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._stall_seconds = stall_seconds
        self._beat_seconds = min(stall_seconds, peer_stall_seconds) / BEATS
        self._hear, self._lost = hear, lost
        self._received = bytearray()
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._writing = False
        self._heard_at = time.monotonic()
        connection.setblocking(False)
        self._loop.add_reader(connection.fileno(), self._readable)
        self._beat = self._loop.call_later(self._beat_seconds, self._tick)
        # A TLS layer may hold bytes already that the kernel will not announce any more.
        self._loop.call_soon(self._readable)

    def send(self, message: wire.Message) -> None:
        """Send a message, in the order of the calls; in vain once the connection has ended."""
        data = wire.frame(message)
        with self._lock:
            if self.ended is not None:
                return
            if not self._unsent:
                data = data[self._try(data) :]
            if not data:
                return
            self._unsent += data
            crowded = len(self._unsent) > MAX_UNSENT_BYTES
        self._soon(self._drop_crowded if crowded else self._watch)

    def end(self, reason: TransferError) -> None:
        """Close, once; what is not sent yet is not sent."""
        if self.ended is not None:
            return
        with self._lock:
            self.ended = reason
            self._loop.remove_reader(self._connection.fileno())
            self._loop.remove_writer(self._connection.fileno())
            with contextlib.suppress(OSError):  # the peer may have closed it before us
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
        self._beat.cancel()
        self._lost(reason)

    # ---- reading ----------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            more = self._read()
            while self.ended is None and (body := self._take()) is not None:
                self._hear(body)
            if not more:
                self.end(PeerLost("the peer closed it"))
        except PeerMisbehaved as error:
            self.end(error)
        except OSError as error:
            self.end(PeerLost(f"the connection broke: {error}"))
        except MemoryError:  # it would be tried again at once, for ever
            self.end(PeerLost("there was no memory for what it says"))

    def _read(self) -> bool:
        """Take what is there into `_received`; False at the end."""
        while self.ended is None:
            try:
                with self._lock:
                    data = self._connection.recv(READ_BYTES)
            except _LATER:
                break
            if not data:
                return False
            self._heard_at = time.monotonic()
            self._received += data
            if len(data) < READ_BYTES and not isinstance(self._connection, ssl.SSLSocket):
                break
        return True

    def _take(self) -> bytes | None:
        """The body of the next message, if all of it is here."""
        if len(self._received) < wire.PREFIX.size:
            return None
        [size] = wire.PREFIX.unpack_from(self._received)
        if not 0 < size <= wire.MAX_MESSAGE_BYTES:
            raise PeerMisbehaved(f"a message of {size} bytes")
        end = wire.PREFIX.size + size
        if len(self._received) < end:
            return None
        body = bytes(self._received[wire.PREFIX.size : end])
        del self._received[:end]
        return body

    # ---- writing ----------------------------------------------------------------------------

    def _try(self, data: bytes | bytearray) -> int:
        """Send what the kernel takes now. A broken connection is noticed by the reader."""
        try:
            return self._connection.send(data)
        except _LATER:
            return 0
        except OSError as error:
            self._soon(self.end, PeerLost(f"the connection broke: {error}"))
            return len(data)

    def _watch(self) -> None:
        """On the event loop: send the rest when there is room."""
        if self.ended is None and not self._writing:
            self._writing = True
            self._loop.add_writer(self._connection.fileno(), self._writable)

    def _writable(self) -> None:
        with self._lock:
            del self._unsent[: self._try(self._unsent)]
            done = not self._unsent
        if done and self.ended is None:
            self._writing = False
            self._loop.remove_writer(self._connection.fileno())

    def _drop_crowded(self) -> None:
        self.end(PeerMisbehaved("the peer does not read what it is told"))

    # ---- keeping alive ----------------------------------------------------------------------

    def _tick(self) -> None:
        silent = time.monotonic() - self._heard_at
        if silent > self._stall_seconds:
            self.end(PeerLost(f"nothing was heard for {silent:.1f} s"))
            return
        self.send(wire.Alive())
        self._beat = self._loop.call_later(self._beat_seconds, self._tick)

    def _soon(self, what: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everything with it
            self._loop.call_soon_threadsafe(what, *arguments)
