"""One supervised process: started, watched, started again, and stopped for certain.

It knows processes, their logs and the status pipe; what they do is told to it as a command line.
Start with `Child.run`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import structlog

from gateway.cli.status import STATUS_FD, Failure, Progress, Ready, parse
from gateway.leash import leashed

log = structlog.get_logger()

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
STEADY_SECONDS = 30.0  # one that ran this long starts again without a pause
LARGEST_LOG_BYTES = 32 * 1024 * 1024
TAIL_BYTES = 4096


class Child:
    """A process of that name, kept alive by `run` until `stop` is called.

    `probe`, for a program that knows nothing of our status pipe, returns once it serves.
    `changed` is called whenever something about it is news.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        log_path: Path,
        *,
        stop_seconds: float,
        environment: Mapping[str, str],
        probe: Callable[[], Awaitable[None]] | None = None,
        changed: Callable[[Child], None] = lambda _: None,
        kept_open: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.stop_seconds = stop_seconds
        self.phase = ""
        self.fraction = 0.0
        self.address = ""
        self.failure = ""
        self.exit_code: int | None = None
        self.ready = asyncio.Event()
        self.exited = asyncio.Event()
        self._command = command
        self._environment = environment
        self.probe = probe
        self._changed = changed
        self._kept_open = kept_open
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()

    async def run(self) -> None:
        """Start it, and start it again whenever it ends, until `stop` is called."""
        pause = FIRST_PAUSE_SECONDS
        self._begin_log()
        self._ended.clear()
        try:
            while not self._stopping.is_set():
                loop = asyncio.get_running_loop()
                began = loop.time()
                await self._run_once()
                steady = loop.time() - began > STEADY_SECONDS
                pause = FIRST_PAUSE_SECONDS if steady else min(2 * pause, LONGEST_PAUSE_SECONDS)
                if not self._stopping.is_set():
                    log.warning("process.exited", process=self.name, code=self.exit_code)
                    await self._pause(pause)
        finally:
            self._kill_group()
            self._ended.set()

    async def stop(self) -> None:
        """End it: politely, and after `stop_seconds` with force. Returns when it is gone."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.stop_seconds):
                await self._ended.wait()
        except TimeoutError:
            log.warning("process.killed", process=self.name, after_seconds=self.stop_seconds)
            self.kill()
            await self._ended.wait()

    def kill(self) -> None:
        """End it now."""
        self._stopping.set()
        self._kill_group()

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that it has logged."""
        with self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def trim_log(self) -> None:
        """Move a log that has grown too long aside. The process goes on writing to the file."""
        if self.log_path.stat().st_size > LARGEST_LOG_BYTES:
            shutil.copyfile(self.log_path, f"{self.log_path}.1")
            os.truncate(self.log_path, 0)

    # ---- one life --------------------------------------------------------------------------

    async def _run_once(self) -> None:
        """From start to exit, with its status pipe read meanwhile."""
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        with self.log_path.open("ab") as output:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *leashed(self._command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**self._environment, STATUS_FD: str(writing)},
                    pass_fds=(writing, *self._kept_open),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
        if self._stopping.is_set():  # the order to stop came while it was being started
            self._signal(signal.SIGTERM)
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(os.fdopen(reading, "rb")))
            probing = tasks.create_task(self._until_probed())
            self.exit_code = await self._process.wait()
            watching.cancel()
            probing.cancel()
        self._kill_group()
        self._process = None
        self.ready.clear()
        self.exited.set()
        self._changed(self)

    async def _until_probed(self) -> None:
        if self.probe is None:
            return
        try:
            await self.probe()
        except TimeoutError:
            log.warning("process.muted", process=self.name)
            self._kill_group()
        else:
            self._set_ready("")

    async def _watch(self, pipe: IO[bytes]) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while line := await reader.readline():
                self._hear(line)
        finally:
            transport.close()

    def _hear(self, line: bytes) -> None:
        match parse(line):
            case Progress(phase, fraction):
                self.phase, self.fraction = phase, fraction
                self._changed(self)
            case Ready(address):
                self._set_ready(address)
            case Failure(message):
                self.failure = message
            case None:
                log.warning("process.misreported", process=self.name)

    def _set_ready(self, address: str) -> None:
        self.address = address
        self.fraction = 1.0
        self.ready.set()
        self._changed(self)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _begin_log(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists():
            self.log_path.replace(f"{self.log_path}.1")
        self.log_path.touch(mode=0o600)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def _kill_group(self) -> None:
        """Nothing that it has started survives it either."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
