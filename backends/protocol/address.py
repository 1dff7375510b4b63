"""Where a control connection can be reached, as one line of text."""

from __future__ import annotations

MAX_PORT = 65535


def split_address(address: str) -> tuple[str, str, int]:
    """`("unix", path, 0)` or `("tcp", host, port)`.

    Raises:
        ValueError: it is neither `unix:/path` nor `tcp:host:port`.
    """
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return "unix", rest, 0
    host, colon, port = rest.rpartition(":")
    if kind == "tcp" and colon and host and port.isdecimal() and int(port) <= MAX_PORT:
        return "tcp", host.strip("[]"), int(port)
    raise ValueError(f"expected unix:/path or tcp:host:port, got {address!r}")


def join_address(host: str, port: int) -> str:
    """The reverse, for TCP."""
    bare = host.strip("[]")
    return f"tcp:[{bare}]:{port}" if ":" in bare else f"tcp:{bare}:{port}"
