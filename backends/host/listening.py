"""The control address: a Unix socket or a TCP port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path

from backends.protocol import join_address, split_address

TLS_SECONDS = 5.0
"""How long a handshake may take."""


async def listen(
    address: str, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None = None
) -> tuple[asyncio.Server, str]:
    """Listen on `unix:/path` or `tcp:host:port`; the server, and the address with its true port.

    A socket file that nobody answers on is left from a process that died, and is replaced. `tls`
    is for TCP: a Unix socket is open to this user alone.

    Raises:
        ValueError: `address` has neither form.
        OSError: it cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    kind, where, port = split_address(address)
    if kind == "tcp":
        patience = TLS_SECONDS if tls is not None else None
        server = await loop.create_server(
            protocol, where, port, ssl=tls, ssl_handshake_timeout=patience
        )
        return server, join_address(where, server.sockets[0].getsockname()[1])
    path = Path(where)
    await _clear(path)
    old_mask = os.umask(0o177)
    try:
        return await loop.create_unix_server(protocol, where), address
    finally:
        os.umask(old_mask)


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
