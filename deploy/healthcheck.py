"""Exit with 0 when the part of Baton in this container answers, else with 1 and the reason.

`BATON_HEALTH` says what to ask: an HTTP address, or `tcp:HOST:PORT` for a worker.
"""

from __future__ import annotations

import os
import socket
import sys
from urllib.error import URLError
from urllib.request import urlopen

SECONDS = 4.0


def check(target: str) -> None:
    """Ask `target`.

    Raises:
        OSError: it does not answer, or not well.
        ValueError: `target` is no address.
    """
    if target.startswith("tcp:"):
        host, _, port = target.removeprefix("tcp:").rpartition(":")
        socket.create_connection((host, int(port)), SECONDS).close()
    elif target.startswith(("http://", "https://")):
        urlopen(target, timeout=SECONDS).close()  # noqa: S310 - the scheme has just been checked
    else:
        raise ValueError(f"BATON_HEALTH is {target!r}; expected http://... or tcp:HOST:PORT")


if __name__ == "__main__":
    try:
        check(os.environ.get("BATON_HEALTH", ""))
    except (OSError, URLError, ValueError) as error:
        sys.exit(f"unhealthy: {error}")
