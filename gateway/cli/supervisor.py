"""`baton serve`: everything on this machine, each part a child process that cannot outlive us.

Redis starts first, then workers and gateway together. What dies later is started again. Stopping
goes the other way round: the gateway finishes its requests, workers and Redis follow; a second
Ctrl-C kills. Start with `Supervisor.run`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uvloop

from gateway.cli.child import Child
from gateway.cli.screen import Screen, welcome
from gateway.config import Config
from gateway.redis_server import claim, command, find_server, run_dir, wait_until_up
from gateway.settings import ENV_PREFIX

log = structlog.get_logger()

START_SECONDS = 600.0  # a large model from a slow disk
REDIS_START_SECONDS = 60.0
ANSWER_SECONDS = 60.0
WORKER_STOP_SECONDS = 7.0  # beyond its drain: it gives back what is left, and closes
REDIS_STOP_SECONDS = 3.0
TRIM_EVERY_SECONDS = 5.0
READY_REQUEST = "GET /health/ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"


PROGRAM = (sys.executable, "-m", "gateway.cli")


class StartFailed(Exception):
    """A part did not come up; says which, and what it logged last."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Stopped(Exception):
    """The order to stop came before everything was up."""


def serve(config: Config) -> None:
    """Run everything until told to stop.

    Raises:
        StartFailed: a part did not come up.
        DataDirInUse: another Baton has this data folder.
    """
    data_dir = Path(config.data_dir)
    with claim(data_dir) as lock:
        uvloop.run(Supervisor(config, run_dir(data_dir), lock.fileno()).run())


class Supervisor:
    """The parent of all processes."""

    def __init__(
        self, config: Config, sockets: Path, lock_fd: int, program: tuple[str, ...] = PROGRAM
    ) -> None:
        self._program = program
        self._sockets = sockets
        self._lock_fd = lock_fd
        self._logs = Path(config.data_dir) / "logs"
        self._screen = Screen()
        self._config = self._complete(config)
        self._stop = asyncio.Event()
        self._redis = None if config.redis.url else self._redis_child()
        self._workers = [self._own_child(name, "worker") for name in config.workers]
        self._gateway = self._own_child("gateway", "gateway")

    async def run(self) -> None:
        """Start everything, say so, keep it running, and stop it when told to."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # as `nohup` wants it
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self._start(tasks)
                    self._screen.close()
                    print(welcome(self._config, self._gateway.address, str(self._logs)), flush=True)
                    trimming = tasks.create_task(self._trim_logs())
                    await self._stop.wait()
                    trimming.cancel()
                    print("Stopping.", file=sys.stderr, flush=True)
                finally:
                    await self._stop_all()
        except* _Stopped:
            pass
        except* StartFailed as failures:
            raise failures.exceptions[0] from None

    # ---- starting --------------------------------------------------------------------------

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        if self._redis is not None:
            await self._launch(tasks, [self._redis], REDIS_START_SECONDS)
        await self._launch(tasks, [*self._workers, self._gateway], START_SECONDS)
        await self._unless_dead(self._until_answering(), [self._gateway], ANSWER_SECONDS)

    async def _launch(
        self, tasks: asyncio.TaskGroup, children: list[Child], seconds: float
    ) -> None:
        for child in children:
            self._screen.follow(child)
            tasks.create_task(child.run())

        async def all_ready() -> None:
            for child in children:
                await child.ready.wait()

        await self._unless_dead(all_ready(), children, seconds)

    async def _unless_dead(
        self, goal: Coroutine[Any, Any, None], children: list[Child], seconds: float
    ) -> None:
        """Wait for `goal`, but not past a child's death, an order to stop, or the time limit."""
        async with asyncio.TaskGroup() as tasks:
            reached = tasks.create_task(goal)
            stop = tasks.create_task(self._stop.wait())
            deaths: dict[asyncio.Task[Any], Child] = {
                tasks.create_task(child.exited.wait()): child for child in children
            }
            done, pending = await asyncio.wait(
                {reached, stop, *deaths}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            for task in pending:
                task.cancel()
        if stop in done:
            raise _Stopped
        for task in done & deaths.keys():
            raise self._death(deaths[task])
        if reached not in done:
            slow = next((child for child in children if not child.ready.is_set()), children[-1])
            raise StartFailed(
                f"{slow.name} was not ready within {seconds:.0f} s\n{slow.log_tail()}"
            )

    def _death(self, child: Child) -> StartFailed:
        code = child.exit_code or 0
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        why = child.failure or f"{child.log_tail()}\n(the whole log is {child.log_path})"
        return StartFailed(
            f"{child.name} {how} while starting:\n{why}", exit_code=2 if code == 2 else 1
        )

    async def _until_answering(self) -> None:
        """The gateway has heard of its workers and met them: the first request will be answered."""
        while True:
            if await is_answering(self._gateway.address):
                return
            await asyncio.sleep(0.05)

    # ---- stopping --------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._stop.is_set():
            for child in self._children():
                child.kill()
        self._stop.set()

    async def _stop_all(self) -> None:
        self._screen.close()
        await self._gateway.stop()
        await asyncio.gather(*(child.stop() for child in self._workers))
        if self._redis is not None:
            await self._redis.stop()
        (self._sockets / "config.json").unlink(missing_ok=True)

    # ---- the parts -------------------------------------------------------------------------

    def _children(self) -> list[Child]:
        return [self._gateway, *self._workers, *([self._redis] if self._redis else [])]

    def _complete(self, config: Config) -> Config:
        """What the children are told: our Redis, and a secret if nobody has set one."""
        replace = msgspec.structs.replace
        if not config.redis.url:
            url = f"unix://{self._sockets / 'redis.sock'}"
            config = replace(config, redis=replace(config.redis, url=url))
        if not config.security.secret:
            secret = secrets.token_urlsafe(32)
            config = replace(config, security=replace(config.security, secret=secret))
        path = self._sockets / "config.json"
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(config))
        return config

    def _own_child(self, name: str, role: str) -> Child:
        words = [*self._program, role, "--config", str(self._sockets / "config.json")]
        if role == "worker":
            words += ["--name", name]
            stop_seconds = self._config.workers[name].drain_seconds + WORKER_STOP_SECONDS
        else:
            stop_seconds = self._config.gateway.drain_seconds + 2.0
        return self._child(name, words, stop_seconds)

    def _redis_child(self) -> Child:
        folder = Path(self._config.data_dir) / "redis"
        folder.mkdir(mode=0o700, exist_ok=True)
        words = command(find_server(), folder, self._sockets / "redis.sock")
        url = self._config.redis.url
        child = self._child("redis", words, REDIS_STOP_SECONDS)
        child.probe = lambda: wait_until_up(url, REDIS_START_SECONDS)
        return child

    def _child(self, name: str, words: list[str], stop_seconds: float) -> Child:
        return Child(
            name,
            words,
            self._logs / f"{name}.log",
            stop_seconds=stop_seconds,
            environment={k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)},
            changed=self._screen.update,
            kept_open=(self._lock_fd,),
        )

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(TRIM_EVERY_SECONDS)
            for child in self._children():
                child.trim_log()


async def is_answering(address: str) -> bool:
    """Whether the gateway at `http://host:port` says that it is ready."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(READY_REQUEST.format(host=host).encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]
