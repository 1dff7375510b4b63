"""One end of a control connection: frames of a length and a MessagePack message."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import msgspec

from backends.errors import ProtocolError
from backends.protocol.messages import Message

MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_STRANGER_BYTES = 1024 * 1024
LENGTH = struct.Struct(">I")

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
    lets `MAX_UNSENT_BYTES` pile up. `message` may be replaced: the next one goes elsewhere. A peer
    is a stranger, whose frames must be shorter, until `trust` is called.
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
        self._held = bytearray()  # the beginning of a frame
        self._enough = 0  # so many bytes of it, before it is looked at again
        self.message = message
        self._limit = MAX_STRANGER_BYTES
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

    def trust(self) -> None:
        """The peer has proven who it is: its frames may be as long as any."""
        self._limit = MAX_FRAME_BYTES

    def close(self) -> None:
        """Send what is queued, then end the connection."""
        self._ended = True
        if self._transport is not None:
            self._reason = "we closed the connection"
            self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport  # uvloop's class is no asyncio.Transport, it only behaves so
        if self._ended:  # during the handshake of TLS
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._held:  # a long frame in many pieces is put together once
            self._held += data
            if len(self._held) < self._enough:
                return
            data, self._held = bytes(self._held), bytearray()
        decode, until, start = self._decoder.decode, len(data), LENGTH.size
        # One loop and no helpers: most frames are one token, and this is what each of them costs.
        try:
            while start <= until and not self._ended:
                (length,) = LENGTH.unpack_from(data, start - LENGTH.size)
                if length > self._limit:
                    raise ProtocolError(f"a frame of {length} bytes exceeds {self._limit}")
                end = start + length
                if end > until:
                    break
                self.message(self, decode(data[start:end]))
                start = end + LENGTH.size
        except (ProtocolError, *UNREADABLE) as error:
            self.abort(f"the peer sent what it must not: {error}")
        begin = start - LENGTH.size
        if begin < until and not self._ended:
            self._held += data[begin:]
            self._enough = LENGTH.size + (length if start <= until else 0)

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
