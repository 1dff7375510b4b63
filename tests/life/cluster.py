"""A gateway's control plane and some workers in one process, over real sockets and a real Redis."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from backends.api import SteppedBackend
from backends.emulation.synthetic import SyntheticBackend
from backends.host import HostConfig, WorkerHost
from backends.host.peers import Peers
from backends.protocol import Logprob, Sampling
from gateway.admission import Admission, Limits, WorkerRecord, open_redis
from gateway.config import RedisSection
from gateway.life.fleet import Fleet
from gateway.life.job import Job, Take, Timeline
from gateway.life.relay import Relay
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

SHAPE: dict[str, Any] = {"layers": 3, "kv_heads": 2, "head_dim": 16, "verify_kv": True}
PREFILL = {"block_tokens": 32, "axes": "layer kv block token head dim"}
DECODE = {"block_tokens": 16, "axes": "block layer kv head token dim"}
LIMITS = Limits(outage_seconds=LONG_SECONDS, timeout_seconds=PATIENCE_SECONDS)


class Heard:
    """A listener that keeps everything and looks for what must never be."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}
        self.logprobs: list[Logprob | None] = []
        self.prompt: tuple[Logprob, ...] = ()
        self.first = asyncio.Event()
        self._stop_after = stop_after

    def sequence(self, index: int) -> Take:
        return partial(self._take, index)

    def _take(self, index: int, token: int, finish: str | None, logprob: Logprob | None) -> bool:
        assert index not in self.finish, "a token after the end"
        line = self.tokens.setdefault(index, [])
        line.append(token)
        self.logprobs.append(logprob)
        self.first.set()
        stop = self._stop_after is not None and len(line) >= self._stop_after
        if finish or stop:
            self.finish[index] = finish or "stopped"
        return stop

    def prompt_logprobs(self, logprobs: tuple[Logprob, ...]) -> None:
        assert not self.tokens, "prompt logprobs after a token"
        self.prompt = logprobs


class Cluster:
    """Starts and stops workers; carries jobs."""

    redis: Any
    deployment: str

    def __init__(self, folder: Path, fleet: Fleet, relay: Relay, tasks: asyncio.TaskGroup) -> None:
        self.folder = folder
        self.fleet = fleet
        self.relay = relay
        self.hosts: dict[str, WorkerHost] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._records: dict[str, WorkerRecord] = {}
        self._tasks = tasks
        self._jobs = 0

    async def start(
        self,
        name: str,
        role: str,
        *,
        host: dict[str, Any] | None = None,
        backend: SteppedBackend | None = None,
        peers: Callable[..., Peers] = Peers,
        **options: Any,
    ) -> None:
        backend = backend or SyntheticBackend(**{**SHAPE, **options})
        settings = {"listen": f"unix:{self.folder}/{name}.sock", **(host or {})}
        config = HostConfig(id=name, role=role, **settings)
        worker = self.hosts[name] = WorkerHost(config, backend, peers=peers)
        ready = asyncio.Event()
        self._running[name] = self._tasks.create_task(worker.run(ready.set))
        await ready.wait()
        self._records[name] = WorkerRecord(
            id=name,
            incarnation=worker.incarnation,
            role=role,
            model="m",
            address=worker.address,
            prefill_tokens=1 << 30,
            decode_tokens=1 << 30,
        )
        self.fleet.update(self._records)

    async def kill(self, name: str) -> None:
        """End a worker as abruptly as a process in the same process can end."""
        task = self._running.pop(name)
        task.cancel()
        await asyncio.wait([task])

    async def until(self, true: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.005)

    async def paired(self, count: int = 1) -> None:
        await self.until(lambda: len(self.fleet.snapshot().pairs) >= count)

    async def balanced(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Every block of every worker is free again, and the books say so."""
        async with asyncio.timeout(seconds):
            while True:
                books = await self.fleet.ledgers()
                assert all(book.balanced for book in books), books
                if all(book.free_blocks == book.pool_blocks for book in books):
                    return
                await asyncio.sleep(0.01)

    def job(self, prompt: list[int], *, n: int = 1, max_tokens: int = 20, **more: Any) -> Job:
        self._jobs += 1
        sampling = more.pop("sampling", Sampling())
        return Job(
            id=more.pop("id", f"job-{self._jobs}"),
            model="m",
            tenant="t",
            prompt=prompt,
            seeds=tuple(range(7, 7 + n)),
            sampling=sampling,
            max_tokens=max_tokens,
            deadline=asyncio.get_running_loop().time() + more.pop("seconds", LONG_SECONDS),
            decode_estimate=max_tokens,
            salt=more.pop("salt", b"tenant"),
            **more,
        )

    async def carry(self, job: Job, heard: Heard) -> Timeline:
        return await self.relay.carry(job, heard)


@asynccontextmanager
async def cluster(
    redis_url: str, *, fleet: dict[str, Any] | None = None, **relay: Any
) -> AsyncIterator[Cluster]:
    section = RedisSection(url=redis_url)
    name = f"test-{time.time_ns()}"
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        async with open_redis(section) as redis, asyncio.TaskGroup() as tasks:
            admission = Admission(redis, name, name, LIMITS)
            options = {"secret": "", **(fleet or {})}
            workers = Fleet(name, **options)
            settings = {"max_retries": 3, "worker_wait_seconds": PATIENCE_SECONDS, **relay}
            parts = [tasks.create_task(admission.run()), tasks.create_task(workers.run())]
            await admission.until_available()
            await _say_there_are_workers(admission, redis, name)
            made = Cluster(Path(folder), workers, Relay(admission, workers, **settings), tasks)
            made.redis, made.deployment = redis, name
            try:
                yield made
            finally:
                for task in [*made._running.values(), *parts]:
                    task.cancel()


async def _say_there_are_workers(admission: Admission, redis: Any, deployment: str) -> None:
    """Credits in the queue, so that it grants; the fleet is told of the workers directly."""
    from gateway.admission import Registration

    record = WorkerRecord(
        id="credit",
        incarnation=1,
        role="both",
        model="m",
        address="unix:/nowhere",
        prefill_tokens=1 << 30,
        decode_tokens=1 << 30,
    )
    registration = Registration(redis, deployment, record, lease_seconds=600)
    stop = asyncio.Event()
    task = asyncio.ensure_future(registration.run(stop))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await redis.keys(f"*{deployment}*credit*"):
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait([task])
