"""How a child tells its supervisor how far it is: JSON lines on an inherited pipe.

Without a supervisor the same facts are log events. Start with `Reporter`.
"""

from __future__ import annotations

import os
import time

import msgspec
import structlog

log = structlog.get_logger()

STATUS_FD = "BATON_STATUS_FD"
LONGEST_LINE_BYTES = 3072  # less than PIPE_BUF, so that a line is written whole
SHORTEST_PAUSE_SECONDS = 0.1


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """It is loading: what, and which part of that is done (0 to 1)."""

    phase: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """It serves at `address`."""

    address: str


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """It cannot go on, and knows why."""

    message: str


Status = Progress | Ready | Failure
_DECODER: msgspec.json.Decoder[Status] = msgspec.json.Decoder(Status)


class Reporter:
    """The child's end. Takes the pipe from the environment, where it has one."""

    def __init__(self) -> None:
        number = os.environ.pop(STATUS_FD, "")
        self._fd = int(number) if number else -1
        self._last = 0.0
        if self._fd >= 0:
            os.set_inheritable(self._fd, False)

    def progress(self, phase: str, fraction: float) -> None:
        """`fraction` of `phase` is done. May be called often."""
        now = time.monotonic()
        if self._fd >= 0 and (fraction >= 1 or now - self._last >= SHORTEST_PAUSE_SECONDS):
            self._last = now
            self._send(Progress(phase, min(max(fraction, 0.0), 1.0)))

    def ready(self, address: str) -> None:
        """It serves now."""
        log.info("process.started", address=address)
        self._send(Ready(address))

    def failed(self, message: str) -> None:
        """It is about to exit, because of `message`."""
        self._send(Failure(message[:2048]))

    def _send(self, status: Status) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, msgspec.json.encode(status)[:LONGEST_LINE_BYTES] + b"\n")
        except BrokenPipeError:  # nobody listens any more
            os.close(self._fd)
            self._fd = -1


def parse(line: bytes) -> Status | None:
    """The status on a line; None for one that is none."""
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError:
        return None
