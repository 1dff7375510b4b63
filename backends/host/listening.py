"""The control address: a Unix socket or a TCP port."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path


async def listen(
    address: str, protocol: Callable[[], asyncio.Protocol]
) -> tuple[asyncio.Server, str]:
    """Listen on `unix:/path` or `tcp:host:port`; the server, and the address with its true port.

    A socket file that nobody answers on is left from a process that died, and is replaced.

    Raises:
        ValueError: `address` has neither form.
        OSError: it cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        path = Path(rest)
        await _clear(path)
        old_mask = os.umask(0o177)
        try:
            return await loop.create_unix_server(protocol, str(path)), address
        finally:
            os.umask(old_mask)
    host, colon, port = rest.rpartition(":")
    if kind == "tcp" and colon and port.isdecimal():
        server = await loop.create_server(protocol, host.strip("[]"), int(port))
        return server, f"tcp:{host}:{server.sockets[0].getsockname()[1]}"
    raise ValueError(f"address {address!r} is neither unix:/path nor tcp:host:port")


async def _clear(path: Path) -> None:
    if not path.is_socket():  # noqa: ASYNC240 -- once, before anything is served
        return
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except ConnectionRefusedError:
        path.unlink()  # noqa: ASYNC240
    else:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        raise OSError(f"somebody else listens on {path}")
