"""Who is at the other end of a Unix socket, and whether that process still lives."""

from __future__ import annotations

import os
import select
import socket
import struct

CREDENTIALS = struct.Struct("3i")
SO_PEERPIDFD = 77


def require_own(connection: socket.socket) -> int:
    """The process at the other end, which must be of our own user. Returns its number.

    Raises:
        PermissionError: it is somebody else's.
        OSError: it has gone.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _ = CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise PermissionError(f"it runs as user {uid}, we as {os.geteuid()}")
    return int(pid)


class Process:
    """A process that can be watched, whatever becomes of its number."""

    def __init__(self, connection: socket.socket) -> None:
        """Look at whoever is at the other end of `connection`.

        Raises:
            PermissionError: it is of another user.
            OSError: it cannot be watched from here, or has gone.
        """
        self.pid = require_own(connection)
        if self.pid <= 0:
            raise ProcessLookupError("its process is not visible from here")
        try:
            raw = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        except OSError:  # a kernel before 6.5
            self._fd = os.pidfd_open(self.pid)
        else:
            (self._fd,) = struct.unpack("i", raw)

    @property
    def dead(self) -> bool:
        """Whether it has ended: no thread of it runs any more. A stopped one has not."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)
