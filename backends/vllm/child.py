"""The engine process as its worker sees it: started, spoken to, heard, ended.

Sending and hearing have a thread each, so that neither a slow engine nor a stopped one blocks the
worker's event loop.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from backends.errors import BackendError, BackendMisconfigured
from backends.vllm.messages import (
    FromEngine,
    Inbox,
    Loaded,
    Setup,
    ToEngine,
    Unfit,
    frame,
)

END_SECONDS = 5.0
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What vLLM's process is told by its environment, unless ours says otherwise."""


class Child:
    """One engine process. `tell` may be called from any thread."""

    def __init__(self, setup: Setup, threads: int | None) -> None:
        ours, theirs = socket.socketpair()
        environment = {**QUIET, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "backends.vllm.process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), setup.arena_fd),
                env=environment,
            )
        self._end = ours
        self._inbox: Inbox[FromEngine] = Inbox(ours, FromEngine)
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closing = False
        self._threads: list[threading.Thread] = []
        ours.sendall(frame(setup))

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def loaded(self, seconds: float) -> Loaded:
        """Wait until it is ready.

        Raises:
            BackendMisconfigured: it refuses the model or an option, or took too long.
        """
        deadline = time.monotonic() + seconds
        try:
            while True:
                self._end.settimeout(max(0.001, deadline - time.monotonic()))
                for message in self._inbox.read():
                    if isinstance(message, Unfit):
                        raise BackendMisconfigured(f"vLLM: {message.reason}")
                    if isinstance(message, Loaded):
                        self._end.settimeout(None)
                        return message
        except TimeoutError:
            raise BackendMisconfigured(f"load_seconds: vLLM took longer than {seconds}") from None
        except (EOFError, OSError) as error:
            raise BackendMisconfigured(f"vLLM ended as it loaded{self._why()}") from error

    def listen(self, hear: Callable[[FromEngine], None], died: Callable[[str], None]) -> None:
        """Pass on what it says, from a thread, and its end if nobody asked for it."""
        for work in (lambda: self._hear(hear, died), self._send):
            thread = threading.Thread(target=work, name="vllm", daemon=True)
            thread.start()
            self._threads.append(thread)

    def tell(self, message: ToEngine) -> None:
        """Send it a message, soon."""
        self._outbox.put(frame(message))

    def close(self) -> None:
        """End the process, by force if it does not within some seconds. Safe to call twice."""
        self._closing = True
        self._outbox.put(b"")
        with suppress(OSError):  # it may have gone by itself
            self._end.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(END_SECONDS)
        self._end.close()

    def _send(self) -> None:
        while data := self._outbox.get():
            try:
                self._end.sendall(data)
            except OSError:
                return  # the other thread says so

    def _hear(self, hear: Callable[[FromEngine], None], died: Callable[[str], None]) -> None:
        why = ""
        try:
            while True:
                for message in self._inbox.read():
                    hear(message)
        except (EOFError, OSError):
            why = f"the engine process ended{self._why()}"
        except BackendError as error:
            why = str(error)
        if not self._closing:
            died(why)

    def _why(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        if code < 0:
            return f" by {signal.Signals(-code).name}"
        return f" with exit code {code}"
