"""The supervisor with a real Redis, and stand-ins for the parts that take long to load."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.redis_server import run_dir
from tests.support.patience import PATIENCE_SECONDS

STAND_IN = """
import http.server, json, os, sys, threading, time
role, name = sys.argv[1], sys.argv[-1] if sys.argv[1] == "worker" else "gateway"
fault = os.environ.get("FAULT", "")
if fault == f"{name} fails":
    sys.exit("no such device")
if fault == f"{name} hangs":
    time.sleep(600)
if fault == f"{name} ignores":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
address = name
if role == "gateway":
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
report = {"type": "ready", "address": address}
os.write(int(os.environ["BATON_STATUS_FD"]), json.dumps(report).encode() + b"\\n")
time.sleep(600)
"""

SUPERVISE = """
import sys, uvloop
from pathlib import Path
from gateway.cli.supervisor import StartFailed, Supervisor
from gateway.redis_server import claim, run_dir
from gateway.settings import load
data, stand_in, drain = Path(sys.argv[1]), *sys.argv[2:]
config = load(environ={"BATON__DATA_DIR": str(data), "BATON__GATEWAY__DRAIN_SECONDS": drain})
with claim(data) as lock:
    program = (sys.executable, stand_in)
    try:
        uvloop.run(Supervisor(config, run_dir(data), lock.fileno(), program).run())
    except StartFailed as error:
        sys.exit(str(error))
"""


def until(fact: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Baton:
    """A supervisor in a process of its own."""

    def __init__(self, folder: Path, fault: str = "", drain: int = 1) -> None:
        self.folder = folder
        self.data = folder / "data"
        stand_in = folder / "stand_in.py"
        stand_in.write_text(STAND_IN)
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISE, str(self.data), str(stand_in), str(drain)],
                stdout=output,
                stderr=output,
                env={**os.environ, "FAULT": fault},
            )
        self.seen: set[psutil.Process] = set()

    def said(self) -> str:
        return self.output.read_text()

    def children(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.seen.update(found)
        return found

    def child(self, word: str) -> psutil.Process | None:
        for process in self.children():
            try:
                if word in " ".join(process.cmdline()):
                    return process
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return None

    def until_up(self) -> None:
        until(lambda: "stop      Ctrl-C" in self.said())
        assert len(self.children()) == 4

    def nothing_left(self) -> bool:
        return not any(
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            for process in self.seen
        )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Baton]]:
    started: list[Baton] = []

    def _start(*what: Any) -> Baton:
        started.append(Baton(tmp_path, *what))
        return started[-1]

    yield _start
    for baton in started:
        baton.process.kill()
        baton.process.wait()
    sockets = run_dir(tmp_path / "data")
    for leftover in sockets.iterdir():
        leftover.unlink()
    sockets.rmdir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_every_process(start: Callable[..., Baton], number: int) -> None:
    baton = start()
    baton.until_up()
    baton.process.send_signal(number)
    assert baton.process.wait(PATIENCE_SECONDS) == 0
    assert baton.nothing_left()


def test_ctrl_c_while_loading_stops_every_process(start: Callable[..., Baton]) -> None:
    baton = start("decode hangs")
    until(lambda: "prefill: ready" in baton.said())
    assert len(baton.children()) == 4
    baton.process.send_signal(signal.SIGINT)
    assert baton.process.wait(PATIENCE_SECONDS) == 0
    assert baton.nothing_left()


def test_a_second_ctrl_c_does_not_wait(start: Callable[..., Baton]) -> None:
    baton = start("gateway ignores", 500)
    baton.until_up()
    baton.process.send_signal(signal.SIGINT)
    until(lambda: "Stopping." in baton.said())
    baton.process.send_signal(signal.SIGINT)
    assert baton.process.wait(PATIENCE_SECONDS) == 0
    assert baton.nothing_left()


def test_what_ignores_the_order_to_stop_is_killed_in_time(start: Callable[..., Baton]) -> None:
    baton = start("gateway ignores")
    baton.until_up()
    baton.process.send_signal(signal.SIGTERM)
    assert baton.process.wait(PATIENCE_SECONDS) == 0
    assert baton.nothing_left()


def test_nothing_outlives_a_supervisor_that_was_killed(start: Callable[..., Baton]) -> None:
    baton = start()
    baton.until_up()
    baton.process.kill()
    until(baton.nothing_left)
    again = start()
    again.until_up()


@pytest.mark.parametrize("word", ["redis.sock", "--name prefill", "gateway --config"])
def test_what_dies_is_started_again(start: Callable[..., Baton], word: str) -> None:
    baton = start()
    baton.until_up()
    until(lambda: baton.child(word))
    victim = baton.child(word)
    assert victim is not None
    victim.kill()
    until(lambda: (found := baton.child(word)) is not None and found.pid != victim.pid)


def test_a_part_that_fails_at_start_ends_it_all_with_its_log(start: Callable[..., Baton]) -> None:
    baton = start("decode fails")
    assert baton.process.wait(PATIENCE_SECONDS) == 1
    assert "decode exited with code 1 while starting" in baton.said()
    assert "no such device" in baton.said()


def test_a_second_baton_on_the_same_data_is_refused(start: Callable[..., Baton]) -> None:
    first = start()
    first.until_up()
    second = subprocess.run(first.process.args, capture_output=True, text=True, check=False)
    assert f"in use by another Baton (process {first.process.pid})" in second.stderr
    assert first.child("redis.sock")


def test_the_children_s_settings_are_for_this_user_only(start: Callable[..., Baton]) -> None:
    baton = start()
    baton.until_up()
    path = run_dir(baton.data) / "config.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert '"secret":""' not in path.read_text()
    baton.process.terminate()
    baton.process.wait(PATIENCE_SECONDS)
    assert not path.exists()
