"""Send from and receive into many places at once, named by address: no Python object for each.

`socket.sendmsg` wants a buffer object for every place, which costs more than copying a few
kilobytes. These work on sockets that do not block, and without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

MAX_PLACES = 1024
"""The kernel takes no more of them in one call (`IOV_MAX`)."""


class _Message(ctypes.Structure):
    """`struct msghdr`."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint32),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.argtypes = (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)
    _call.restype = ctypes.c_ssize_t


class Places:
    """Memory in many places, to be worked off from the first to the last.

    One call into the kernel deals with about `most` bytes.
    """

    def __init__(self, addresses: I64, lengths: I64, most: int) -> None:
        """Take note of places that the caller keeps alive and in place; none of them is empty."""
        addresses, lengths = cut(most, lengths, addresses)
        self._table = np.stack([addresses, lengths], axis=1)  # `struct iovec` each
        self._ends = np.cumsum(lengths)
        self._most = most
        self._next = 0
        self._all = int(self._ends[-1])
        self.left = self._all

    def send(self, connection: socket.socket) -> None:
        """Send as much as the kernel takes now.

        Raises:
            BlockingIOError: it takes nothing.
            OSError: the connection broke.
        """
        self._done(self._call(_libc.sendmsg, connection, socket.MSG_NOSIGNAL))

    def receive(self, connection: socket.socket) -> None:
        """Receive as much as is there now.

        Raises:
            BlockingIOError: nothing is.
            OSError: the connection broke, or was closed.
        """
        count = self._call(_libc.recvmsg, connection, 0)
        if not count:
            raise ConnectionResetError("a connection was closed within a frame")
        self._done(count)

    def views(self) -> Iterator[memoryview]:
        """All of them one by one, for those who need objects."""
        for address, length in self._table.tolist():
            yield memoryview((ctypes.c_char * length).from_address(address)).cast("B")

    def _call(self, call: ctypes._NamedFuncPointer, connection: socket.socket, flags: int) -> int:
        begin = self._next
        end = int(np.searchsorted(self._ends, self._all - self.left + self._most, side="right"))
        message = _Message(
            places=self._table.ctypes.data + 16 * begin,
            count=min(max(end - begin, 1), MAX_PLACES),
        )
        count = int(call(connection.fileno(), ctypes.byref(message), flags))
        if count < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))  # of the kind that `error` stands for
        return count

    def _done(self, count: int) -> None:
        """Pass over the first `count` bytes of what is left."""
        self.left -= count
        done = self._all - self.left
        self._next = int(np.searchsorted(self._ends, done, side="right"))
        if self.left:
            rest = int(self._ends[self._next]) - done
            place = self._table[self._next]
            place += (place[1] - rest, rest - place[1])


def cut(most: int, lengths: I64, *starts: I64) -> tuple[I64, ...]:
    """Runs of at most `most` bytes each that make up the given ones: starts, then lengths."""
    if lengths.max() <= most:
        return (*starts, lengths)
    counts = -(-lengths // most)
    before = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    before *= most
    return (
        *(np.repeat(it, counts) + before for it in starts),
        np.minimum(np.repeat(lengths, counts) - before, most),
    )
