"""An event stream on its way to one client.

Once its headers are out, an event is one write of a ready HTTP chunk to the transport, with no
task and no queue between. What has not been sent is bounded by the transport's high-water mark
and, in the kernel, by the socket's; above them `congested` is true and the writer of events holds
back.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from aiohttp import HttpVersion11, web

from gateway.errors import SlowClient

HIGH_WATER_BYTES = 32 * 1024
UNSENT_BYTES = 16 * 1024
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
COMMENT = b": keep-alive\n\n"


def _closed(_: bytes) -> None:
    raise AssertionError("written before the headers")


def _bound_kernel_buffer(transport: asyncio.Transport) -> None:
    """Have the kernel refuse data while much is unsent; it would take megabytes otherwise."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


class Wire:
    """Events written before `open` wait for it; they are few, as the first one asks for it."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._backlog: list[bytes] = []
        self.response = web.StreamResponse(headers=HEADERS)
        self.protocol = request.protocol
        self.chunked = request.version >= HttpVersion11
        self.opened = False
        self.write: Callable[[bytes], None] = _closed

    @property
    def congested(self) -> bool:
        """Whether the client is behind."""
        return self.opened and self.protocol.writing_paused

    async def open(self) -> None:
        """Send the headers, and what waited for them.

        Raises:
            ConnectionError: the client has left.
        """
        await self.response.prepare(self._request)
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        _bound_kernel_buffer(transport)
        self.write = transport.write
        self.opened = True
        if self._backlog:
            self.write(b"".join(self._backlog))
            self._backlog.clear()

    def send(self, data: bytes) -> None:
        """One or more whole events, as one HTTP chunk."""
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self.opened:
            self.write(data)
        else:
            self._backlog.append(data)

    async def drained(self, seconds: float) -> None:
        """Wait until the client has caught up.

        Raises:
            SlowClient: it does not within `seconds`, and is disconnected.
            ConnectionError: it has left.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._request.writer.drain()
        except TimeoutError as error:
            self.cut()
            message = f"the client read nothing for {seconds:g} s and was disconnected"
            raise SlowClient(message) from error

    async def close(self, seconds: float) -> None:
        """End the stream as HTTP wants it.

        Raises:
            SlowClient: the client does not read the rest within `seconds`.
            ConnectionError: it has left.
        """
        try:
            async with asyncio.timeout(seconds):
                await self.response.write_eof()
        except TimeoutError as error:
            self.cut()
            raise SlowClient("the client did not read the end of its stream") from error

    def cut(self) -> None:
        """End the connection at once: what was sent so far is visibly incomplete."""
        if self._request.transport is not None:
            self._request.transport.abort()
