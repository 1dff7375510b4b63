"""Ports for servers that are killed and started again in the same place."""

import random
import socket

_PORTS = iter(random.sample(range(15_000, 30_000), 15_000))
"""Below those from which systems take one for each outgoing connection.

One of those may be somebody else's by the time that a server comes back.
"""


def free_port() -> int:
    """A port on which nobody listens here, another one each time."""
    for port in _PORTS:
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")
