"""Real Redis servers for the tests of the control plane, one of each kind that is installed."""

import asyncio
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from gateway.admission import open_redis
from gateway.config import RedisSection
from gateway.leash import leashed
from gateway.redis_server import BUNDLED, PROGRAMS, command, wait_until_up
from tests.support.patience import PATIENCE_SECONDS


def programs() -> dict[str, Path]:
    """Every server program on this machine, by a name for test ids."""
    found = {name: Path(path) for name in PROGRAMS if (path := shutil.which(name))}
    for package, inside in BUNDLED:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found[package] = Path(folder) / inside
    return found


class LiveServer:
    """A Redis server that a test may kill and start again."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.process = subprocess.Popen(
            leashed(command(self.program, self.folder, self.socket)), stdout=subprocess.DEVNULL
        )
        await wait_until_up(self.url, PATIENCE_SECONDS)

    async def logged(self) -> None:
        """Return once all that was answered is in the log: while its disk is busy, it is not."""
        async with Redis.from_url(self.url) as redis, asyncio.timeout(PATIENCE_SECONDS):
            while (await redis.info("persistence"))["aof_buffer_length"]:
                await asyncio.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE_SECONDS)


@pytest.fixture(scope="session", params=sorted(programs()))
def shared_server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(programs()[request.param], Path(folder))
        asyncio.run(server.start())
        yield server
        server.kill()


@pytest.fixture
async def mortal_server() -> AsyncIterator[LiveServer]:
    """A server of this test alone, which may be killed."""
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(next(iter(programs().values())), Path(folder))
        await server.start()
        yield server
        server.kill()


@pytest.fixture
async def redis(shared_server: LiveServer) -> AsyncIterator[Redis]:
    """A client of an empty server; afterwards no key may be left that would stay for ever."""
    with BlockingRedis.from_url(shared_server.url) as blocking:
        blocking.flushall()
    async with open_redis(RedisSection(url=shared_server.url)) as client:
        yield client
    with BlockingRedis.from_url(shared_server.url) as blocking:
        immortal = [key for key in blocking.scan_iter() if blocking.ttl(key) == -1]
    assert immortal == []
