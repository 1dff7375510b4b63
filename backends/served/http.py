"""One server of a fleet, over HTTP: JSON there, JSON or a stream of events back.

The only file here that knows aiohttp. Whatever goes wrong comes out as a `BackendError` that names
the server; every wait has a deadline and every length a bound.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from backends.errors import BackendError, BackendMisconfigured, PoolExhausted

CONNECT_SECONDS = 5.0
MOST_LINE_BYTES = 1 << 24
MOST_ANSWER_BYTES = 1 << 28
SHOWN_BYTES = 400
MOST_SECONDS = 3600
FULL = (429, 503)

_PREFIX, _DONE = b"data:", b"[DONE]"


class ServerFailed(BackendError):
    """A server of the fleet could not be reached, was silent too long, or refused a request."""


def check_seconds(name: str, value: float) -> None:
    """Refuse what is no deadline.

    Raises:
        BackendMisconfigured: names the option.
    """
    if not 0 < value <= MOST_SECONDS:
        raise BackendMisconfigured(f"{name} must be above 0 and at most {MOST_SECONDS}, is {value}")


class Server:
    """One base address. `silence_seconds` is how long it may say nothing."""

    def __init__(self, address: str, silence_seconds: float) -> None:
        check_seconds("silence_seconds", silence_seconds)
        self.address = address.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds
        )
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make ready to speak, on this event loop."""
        connections = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connections)

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> Any:
        """What it answers.

        Raises:
            ServerFailed: says why it did not.
        """
        async with self._request("GET", path, None) as response:
            return await self._whole(response)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers, all of it.

        Raises:
            PoolExhausted: it has no room now.
            ServerFailed: says why it did not.
        """
        async with self._request("POST", path, body) as response:
            return await self._whole(response)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
        """The events of its answer. Closing the generator closes the connection.

        Raises:
            PoolExhausted: it has no room now.
            ServerFailed: says why it did not, or that it broke off.
        """
        async with self._request("POST", path, body) as response:
            rest = b""
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > MOST_LINE_BYTES:
                    raise ServerFailed(f"{self.address}: a line of over {MOST_LINE_BYTES} bytes")
                for line in lines:
                    event = line.removeprefix(_PREFIX).strip()
                    if event == _DONE:
                        return
                    if line.startswith(_PREFIX):
                        yield self._read(event)
            raise ServerFailed(f"{self.address}: the stream ended before its end")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        assert self._session is not None
        data = None if body is None else msgspec.json.encode(body)
        headers = {"content-type": "application/json"}
        try:
            async with self._session.request(
                method, self.address + path, data=data, headers=headers
            ) as response:
                if response.status >= 400:
                    shown = (await response.content.read(SHOWN_BYTES)).decode("utf-8", "replace")
                    kind = PoolExhausted if response.status in FULL else ServerFailed
                    raise kind(f"{self.address}{path} answered {response.status}: {shown}")
                yield response
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            detail = str(error) or type(error).__name__
            raise ServerFailed(f"{self.address}{path}: {detail}") from error

    async def _whole(self, response: aiohttp.ClientResponse) -> Any:
        data = b""
        async for part in response.content.iter_any():
            data += part
            if len(data) > MOST_ANSWER_BYTES:
                raise ServerFailed(f"{self.address}: over {MOST_ANSWER_BYTES} bytes")
        return self._read(data)

    def _read(self, data: bytes) -> Any:
        try:
            return msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise ServerFailed(f"{self.address}: no JSON: {data[:80]!r}") from error
