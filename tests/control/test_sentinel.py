"""A failover: real servers, real sentinels, and what gateways make of it."""

import asyncio
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from gateway.admission import open_redis
from gateway.config import RedisSection
from gateway.leash import leashed
from gateway.redis_url import Sentinels, sentinels_of
from gateway.settings import ConfigError, load
from tests.support.patience import PATIENCE_SECONDS
from tests.support.ports import free_port

from .conftest import programs
from .queueing import (
    Turn,
    book,
    gateway,
    in_line,
    patient,
    published,
    ticket,
    until,
    waiting,
    workers,
)

SENTINELS = 3
DOWN_MS = 1500  # more than a busy machine makes one wait


class Site:
    """A primary, a replica, and sentinels that watch them."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._ports = [free_port(), free_port()]
        self._sentinels = [free_port() for _ in range(SENTINELS)]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._sentinels)
        self.section = RedisSection(url=f"redis+sentinel://{hosts}/baton")

    async def start(self) -> None:
        first, second = self._ports
        self._run(first)
        self._run(second, "--replicaof", "127.0.0.1", str(first))
        for number, port in enumerate(self._sentinels):
            file = self._folder / f"sentinel-{number}.conf"
            file.write_text(
                f"port {port}\ndir {self._folder}\n"
                f"sentinel monitor baton 127.0.0.1 {first} 2\n"
                f"sentinel down-after-milliseconds baton {DOWN_MS}\n"
                "sentinel failover-timeout baton 3000\n"
            )
            self._spawn(port, [str(self._program), str(file), "--sentinel"])
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await self._all_know_each_other():
                await asyncio.sleep(0.05)

    def _run(self, port: int, *more: str) -> None:
        words = [str(self._program), "--port", str(port), "--save", "", "--dir", str(self._folder)]
        self._spawn(port, [*words, "--repl-diskless-sync-delay", "0", *more])

    def _spawn(self, port: int, words: list[str]) -> None:
        self.processes[port] = subprocess.Popen(leashed(words), stdout=subprocess.DEVNULL)

    async def _all_know_each_other(self) -> bool:
        for port in self._sentinels:
            try:
                async with Redis(port=port, protocol=2) as sentinel:
                    state = (await sentinel.sentinel_masters())["baton"]
            except (OSError, ConnectionError, KeyError):
                return False
            except Exception as error:
                if "refused" in str(error).lower():
                    return False
                raise
            if state["num-slaves"] < 1 or state["num-other-sentinels"] < SENTINELS - 1:
                return False
        return True

    @property
    def primary(self) -> subprocess.Popen[bytes]:
        return self.processes[self._ports[0]]

    async def replicated(self) -> None:
        """The replica has all that the primary has written by now."""
        async with Redis(port=self._ports[0], protocol=2) as primary:
            await primary.set("marker", 1, px=60_000)
            assert await primary.wait(1, int(1000 * PATIENCE_SECONDS)) == 1

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(PATIENCE_SECONDS)


@pytest.fixture(params=sorted(programs()))
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        made = Site(programs()[request.param], Path(folder))
        try:
            await made.start()
            yield made
        finally:
            made.stop()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_failover_keeps_leases_and_places(site: Site, fault: signal.Signals) -> None:
    """Whoever ran runs on, whoever waited is served, and nobody twice; without a restart."""
    limits = patient(lease_seconds=6.0, timeout_seconds=2.0)
    async with (
        open_redis(site.section) as redis,
        workers(redis, decode=20, lease_seconds=6.0, timeout_seconds=2.0),
        gateway(redis, "g1", limits) as one,
        gateway(redis, "g2", limits) as two,
        asyncio.TaskGroup() as tasks,
    ):
        running = [Turn(tasks, admission, ticket()) for admission in (one, two)]
        for turn in running:
            await turn.inside.wait()
        lined_up = [Turn(tasks, one, ticket()) for _ in range(3)]
        lined_up += [Turn(tasks, two, ticket()) for _ in range(3)]
        await in_line(redis, 6, one, two)
        await site.replicated()
        site.primary.send_signal(fault)
        pipes = (one._pipe, two._pipe)
        await until(
            lambda: all(it.ready and it.former_server for it in pipes),
            2 * PATIENCE_SECONDS,
        )
        await published(redis, 2)
        assert (await book(redis))["held_decode"] == 20
        assert await waiting(redis) == 6
        assert not any(turn.inside.is_set() for turn in lined_up)
        for turn in running:
            turn.leave.set()
        for expected in (2, 4, 6):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while sum(turn.inside.is_set() for turn in lined_up) < expected:
                    await asyncio.sleep(0.005)
            assert sum(turn.inside.is_set() for turn in lined_up) == expected
            for turn in lined_up:
                if turn.inside.is_set():
                    turn.leave.set()
        async with asyncio.timeout(PATIENCE_SECONDS), one.turn(ticket()):
            pass
    assert all(turn.error is None for turn in (*running, *lined_up))


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("redis://host", None),
        ("unix:///run/redis.sock", None),
        (
            "redis+sentinel://a:1,b/primary",
            Sentinels(addresses=(("a", 1), ("b", 26379)), name="primary"),
        ),
        (
            "rediss+sentinel://u:p%40@[::1]:7/x?db=3&sentinel_password=s",
            Sentinels(
                addresses=(("::1", 7),),
                name="x",
                database=3,
                username="u",
                password="p@",
                sentinel_password="s",
                tls=True,
            ),
        ),
    ],
)
def test_addresses_are_understood(url: str, meant: Sentinels | None) -> None:
    assert sentinels_of(url) == meant


@pytest.mark.parametrize(
    "url", ["http://x", "redis+sentinel://a:1", "redis+sentinel:///n", "redis+sentinel://a:x/n"]
)
def test_a_wrong_address_is_an_error_at_its_path(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^redis\.url"):
        load(environ={"BATON__REDIS__URL": url})
