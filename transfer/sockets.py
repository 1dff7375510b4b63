"""Send from and receive into many places at once, named by address: no Python object for each.

`socket.sendmsg` wants a buffer object for every place, which costs more than copying a few
kilobytes. These work on sockets that do not block, without the interpreter's lock, and go on until
the kernel has no more to take or to give.
"""

from __future__ import annotations

import errno
import os
import socket

import numpy as np
from numpy.typing import NDArray

from transfer.raw import compiled, recvmsg, sendmsg, store64

I64 = NDArray[np.int64]

MAX_PLACES = 1024
"""The kernel takes no more of them in one call (`IOV_MAX`)."""

SENT_BYTES = 512 << 10
"""What one `sendmsg` gets, at most: what lies in the socket's buffer shall stay in the cache."""

TAKEN_BYTES = 128 << 10
"""What one `recvmsg` asks for, at most, for the same reason."""

PLACE_BYTES = 16
MESSAGE_BYTES = 56
SCRATCH_BYTES = MAX_PLACES * PLACE_BYTES + MESSAGE_BYTES
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NEXT, _WITHIN, LEFT = range(3)
CLOSED = -1
"""Instead of `errno`: the other end has closed the connection."""


@compiled
def work_once(
    descriptor: int, sends: int, addresses: I64, lengths: I64, state: I64, scratch: int, most: int
) -> int:
    """One call to the kernel for up to `most` bytes; answers as `work_off`."""
    message = scratch + MAX_PLACES * PLACE_BYTES
    count, total = 0, 0
    place, within = state[_NEXT], state[_WITHIN]
    while count < MAX_PLACES and total < most and place < len(lengths):
        size = min(lengths[place] - within, most - total)
        store64(scratch, 2 * count, np.uint64(addresses[place] + within))
        store64(scratch, 2 * count + 1, np.uint64(size))
        count, total, place, within = count + 1, total + size, place + 1, 0
    for i in range(MESSAGE_BYTES // 8):  # `struct msghdr`: but for two fields, zero
        store64(message, i, np.uint64(0))
    store64(message, 2, np.uint64(scratch))
    store64(message, 3, np.uint64(count))
    done = sendmsg(descriptor, message, _FLAGS) if sends else recvmsg(descriptor, message, _FLAGS)
    if done <= 0:
        return -done if done else CLOSED
    state[LEFT] -= done
    while done:
        size = min(lengths[state[_NEXT]] - state[_WITHIN], done)
        done -= size
        state[_WITHIN] += size
        if state[_WITHIN] == lengths[state[_NEXT]]:
            state[_NEXT], state[_WITHIN] = state[_NEXT] + 1, 0
    return 0


@compiled
def work_off(
    descriptor: int, sends: int, addresses: I64, lengths: I64, state: I64, scratch: int
) -> int:
    """Go on where `state` says; 0 when all is done, else `errno`, or `CLOSED`."""
    most = SENT_BYTES if sends else TAKEN_BYTES
    while state[LEFT]:
        error = work_once(descriptor, sends, addresses, lengths, state, scratch, most)
        if error:
            return error
    return 0


class Places:
    """Memory in many places, to be worked off from the first to the last."""

    def __init__(self, addresses: I64, lengths: I64) -> None:
        """Take note of places that the caller keeps alive and in place; none of them is empty."""
        self._addresses = np.ascontiguousarray(addresses)
        self._lengths = np.ascontiguousarray(lengths)
        self._state = np.array([0, 0, lengths.sum()], np.int64)
        self._scratch = np.empty(SCRATCH_BYTES, np.uint8)

    @property
    def left(self) -> int:
        """Bytes that are still to be sent or received."""
        return int(self._state[LEFT])

    def send(self, connection: socket.socket) -> None:
        """Send all that the kernel takes now.

        Raises:
            BlockingIOError: it takes no more.
            OSError: the connection broke.
        """
        self._call(connection, 1)

    def receive(self, connection: socket.socket) -> None:
        """Receive all that is there now.

        Raises:
            BlockingIOError: there is no more.
            OSError: the connection broke, or was closed.
        """
        self._call(connection, 0)

    def _call(self, connection: socket.socket, sends: int) -> None:
        raise_for(work_off(connection.fileno(), sends, *self.table))

    @property
    def table(self) -> tuple[I64, I64, I64, int]:
        """What the kernels are told."""
        return self._addresses, self._lengths, self._state, self._scratch.ctypes.data


def raise_for(error: int) -> None:
    """Raise what a kernel's answer means, if it is an error."""
    if error == CLOSED:
        raise ConnectionResetError("a connection was closed within a frame")
    if error and error != errno.EINTR:
        raise OSError(error, os.strerror(error))  # of the kind that `error` stands for
