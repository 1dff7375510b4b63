"""A rank does not outlive the worker that it computes for: nobody else would free its GPU."""

from __future__ import annotations

import os
import threading

ORDERLY_SECONDS = 30.0
"""A library that is shut down has ended its ranks by then."""


def end_without(worker: int, seconds: float = ORDERLY_SECONDS) -> None:
    """The process `worker` is gone or closing: end this one after a while, if it is another."""
    if worker == os.getpid():
        return
    timer = threading.Timer(seconds, os._exit, (os.EX_SOFTWARE,))
    timer.daemon = True
    timer.start()
