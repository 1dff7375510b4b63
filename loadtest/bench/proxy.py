"""The least that a Python proxy can do: copy bytes between two connections, on uvloop.

It looks at nothing, so it is what a wake-up, a read and a write cost in this interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
from typing import Any

import uvloop


class Upstream(asyncio.Protocol):
    """Copies what the upstream sends to the client."""

    def __init__(self, client: asyncio.Transport) -> None:
        self._write = client.write
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.close()


class Client(asyncio.Protocol):
    """Copies what the client sends to a connection upstream of its own."""

    def __init__(self, upstream_port: int, tasks: asyncio.TaskGroup) -> None:
        self._port = upstream_port
        self._tasks = tasks
        self._early = b""
        self._upstream: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._tasks.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        factory = functools.partial(Upstream, self._transport)
        try:
            transport, _ = await loop.create_connection(factory, "127.0.0.1", self._port)
        except OSError:
            self._transport.close()
            return
        self._upstream = transport
        if self._early:
            transport.write(self._early)
        if self._transport.is_closing():
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._upstream is None:
            self._early += data
        else:
            self._upstream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._upstream is not None:
            self._upstream.close()


async def serve(port: int, upstream_port: int) -> None:
    """Proxy on loopback until the process is stopped."""
    async with asyncio.TaskGroup() as tasks:
        client = functools.partial(Client, upstream_port, tasks)
        server = await asyncio.get_running_loop().create_server(client, "127.0.0.1", port)
        await server.serve_forever()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True)
    asked = parser.parse_args()
    uvloop.run(serve(asked.port, asked.upstream_port))


if __name__ == "__main__":
    main()
