"""Two gateways, two prefill and two decode workers and a Redis, each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec
import psutil
from redis.asyncio import Redis

from gateway.admission import WorkerRecord
from gateway.leash import leashed
from gateway.redis_server import command, find_server, wait_until_up
from tests.e2e.site import DECODE, PREFILL, SYNTHETIC, toml
from tests.support.patience import PATIENCE_SECONDS
from tests.support.ports import free_port

Kind = Literal["gateway", "prefill", "decode", "redis"]
MODEL = "smollm2-135m-instruct"
GATEWAYS, PREFILLS, DECODES = ("g1", "g2"), ("p1", "p2"), ("d1", "d2")
BATON = [sys.executable, "-m", "gateway.cli"]
READY_SECONDS = 240.0  # the real model, four times on few cores
STOP_SECONDS = 60.0
STARTED: Mapping[Kind, bytes] = {
    "prefill": b"worker.started",
    "decode": b"worker.started",
    "redis": b"eady to accept connections",
}
"""What stands in their logs once they serve; a gateway is asked."""


class Part:
    """One process, which may be killed, stopped and started again."""

    def __init__(self, name: str, kind: Kind, words: list[str], log: Path, url: str = "") -> None:
        self.name = name
        self.kind = kind
        self.url = url
        self.log = log
        self.starts = 0
        self._words = words
        self._logged_before = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process as it was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs, or could."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; it is ready some time later."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BATON__")}
        with self.log.open("ab") as log:
            self._logged_before = log.tell()
            self._process = subprocess.Popen(
                leashed(self._words), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self.starts += 1

    def send(self, number: signal.Signals) -> None:
        """Send its process a signal, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def serves(self) -> bool:
        """Whether it has come up since it was started: a gateway can be connected to."""
        if not self.url:
            with self.log.open("rb") as log:
                log.seek(self._logged_before)
                return STARTED[self.kind] in log.read()
        host, _, port = self.url.removeprefix("http://").partition(":")
        try:
            async with asyncio.timeout(1):
                _, writer = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def ended(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end; the exit code."""
        assert self._process is not None
        async with asyncio.timeout(seconds):
            while (code := self._process.poll()) is None:
                await asyncio.sleep(0.01)
        return code

    def events(self, event: str) -> Iterator[str]:
        """The lines that it logged under that name."""
        for line in self.log.read_text(errors="replace").splitlines():
            if f'"event":"{event}"' in line.replace(" ", ""):
                yield line


class Site:
    """All parts by their names."""

    def __init__(self, folder: Path, parts: list[Part], redis_url: str) -> None:
        self.folder = folder
        self.parts = {part.name: part for part in parts}
        self.redis_url = redis_url
        self._http: aiohttp.ClientSession | None = None

    def of(self, *kinds: Kind) -> list[Part]:
        """The parts of these kinds."""
        return [part for part in self.parts.values() if part.kind in kinds]

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the gateways are."""
        return tuple(part.url for part in self.of("gateway"))

    async def get(self, url: str, path: str) -> Any:
        """A page of one gateway; None when it does not answer, or not well."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as http,
                http.get(url + path) as answer,
            ):
                return await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until each gateway knows every worker and every pair, and would answer."""
        pairs = len(PREFILLS) * len(DECODES)

        async def whole(url: str) -> bool:
            if await self.get(url, "/health/ready") is None:
                return False
            shown = await self.get(url, "/admin/workers")
            usable = [pair for pair in shown["pairs"] if not pair["refusal"]] if shown else []
            return len(usable) == pairs

        for url in self.urls:
            await self.until(lambda url=url: whole(url), f"{url} is not ready", seconds)

    async def balanced(self, seconds: float) -> None:
        """Wait until nothing is held anywhere, and every book says so."""
        book: Any = None

        async def empty(url: str) -> bool:
            nonlocal book
            book = await self.get(url, "/debug/ledger")
            return (
                book is not None
                and book["balanced"]
                and len(book["workers"]) == len(PREFILLS) + len(DECODES)
                and all(_unused(one) for one in book["workers"])
            )

        for url in self.urls:
            await self.until(lambda url=url: empty(url), lambda: f"still held: {book}", seconds)

    async def until(
        self, fact: Callable[[], Any], otherwise: str | Callable[[], str], seconds: float
    ) -> None:
        """Wait for `fact`, and fail with `otherwise` and the ends of all logs."""
        try:
            async with asyncio.timeout(seconds):
                while not await fact():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            why = otherwise if isinstance(otherwise, str) else otherwise()
            raise AssertionError(f"{why} after {seconds} s\n{self.logs()}") from None

    async def immortal_keys(self) -> list[str]:
        """Keys in Redis that would stay for ever."""
        async with Redis.from_url(self.redis_url, protocol=2) as redis:
            keys = [key async for key in redis.scan_iter(count=1000)]
            lifetimes = [await redis.pttl(key) for key in keys]
        return [key.decode() for key, ms in zip(keys, lifetimes, strict=True) if ms == -1]

    async def records(self) -> list[WorkerRecord]:
        """What the workers have registered."""
        async with Redis.from_url(self.redis_url, protocol=2) as redis:
            found = [await redis.get(key) async for key in redis.scan_iter("*worker:*")]
        return [msgspec.msgpack.decode(one, type=WorkerRecord) for one in found]

    def save_logs(self, folder: Path | None) -> None:
        """Copy all logs to `folder`, where one is given."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for part in self.parts.values():
                shutil.copy(part.log, folder)

    def bugs(self) -> list[str]:
        """What nobody has foreseen: processes that have died by themselves, and tracebacks."""
        dead = [
            f"{part.name} has ended by itself" for part in self.parts.values() if not part.alive
        ]
        return dead + [
            f"{part.name}: {line[:1500]}"
            for part in self.parts.values()
            for line in part.log.read_text(errors="replace").splitlines()
            if "Traceback" in line or '"level":"critical"' in line.replace(" ", "")
        ]

    def logs(self) -> str:
        """The last lines of every part."""
        return "\n".join(
            f"--- {part.name}\n" + "\n".join(part.log.read_text().splitlines()[-8:])
            for part in self.parts.values()
            if part.log.exists()
        )


def _unused(book: dict[str, Any]) -> bool:
    """Whether nothing is held there but what may be reused."""
    return bool(book["free_blocks"] == book["pool_blocks"])


def workers(backend: str, options: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    """The configuration of all workers."""
    return {
        name: {"role": role, "backend": backend, "options": {**options, **shape}, **more}
        for role, names, shape in (("prefill", PREFILLS, PREFILL), ("decode", DECODES, DECODE))
        for name in names
    }


def synthetic(**options: Any) -> dict[str, dict[str, Any]]:
    """Workers that compute nothing, and whose text is known."""
    return workers("synthetic", {**SYNTHETIC, **options}, lease_seconds=5.0)


@asynccontextmanager
async def site(tree: dict[str, Any]) -> AsyncIterator[Site]:
    """Start everything; afterwards nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="baton-storm-") as name:
        folder = Path(name)
        socket = folder / "redis.sock"
        config = folder / "baton.toml"
        url = f"unix://{socket}"
        more = {"data_dir": str(folder / "data"), "redis": {"url": url, **tree.pop("redis", {})}}
        config.write_text(toml({**more, "log": {"format": "json"}, **tree}))
        made = Site(folder, list(_parts(folder, config, socket)), url)
        try:
            for part in made.of("redis"):
                part.start()
            await wait_until_up(url, READY_SECONDS)
            for part in made.of("prefill", "decode", "gateway"):
                part.start()
            await made.ready()
            yield made
        finally:
            await _end(made)


def _parts(folder: Path, config: Path, socket: Path) -> Iterator[Part]:
    data = folder / "redis"
    data.mkdir()
    yield Part("redis", "redis", command(find_server(), data, socket), folder / "redis.log")
    for kind, names in (("prefill", PREFILLS), ("decode", DECODES)):
        for name in names:
            words = [*BATON, "worker", "--config", str(config), "--name", name]
            yield Part(name, kind, words, folder / f"{name}.log")
    for name in GATEWAYS:
        port = free_port()
        words = [*BATON, "gateway", "--config", str(config), "--port", str(port)]
        yield Part(name, "gateway", words, folder / f"{name}.log", f"http://127.0.0.1:{port}")


async def _end(made: Site) -> None:
    children = [psutil.Process(part.pid) for part in made.parts.values() if part.alive]
    for part in made.parts.values():
        part.send(signal.SIGKILL)
    for part in made.parts.values():
        if part.starts:
            with contextlib.suppress(TimeoutError):
                await part.ended(PATIENCE_SECONDS)
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, PATIENCE_SECONDS)
    assert not alive, f"left over: {alive}"
