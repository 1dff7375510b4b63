"""Start processes on chosen cores, read what they use, and never leave one behind."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gateway.leash import leashed

TICKS = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 10.0


class NotStarted(Exception):
    """A process ended, or did not answer in time; carries the end of its output."""


def unwind_when_told_to_stop() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that it stops what it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all of its threads, since its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """The process and everything below it, parents first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in descendants(int(child)))]


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def raise_file_limit(wanted: int) -> int:
    """Allow as many open files as `wanted`, or as the machine permits. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, wanted if hard == resource.RLIM_INFINITY else min(wanted, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    cores: frozenset[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, on `cores` where given, its output in `log`; stop it and its children.

    It dies with us, whatever kills us.
    """

    def pin() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)

    with log.open("wb") as output:
        process = subprocess.Popen(
            leashed([*command]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=pin,  # before the process has threads, so that all of them are pinned
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)


def wait_until(
    answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float
) -> None:
    """Wait for a started process to do what it was started for.

    Raises:
        NotStarted: it ended, or the time is up.
    """
    until = time.monotonic() + seconds
    while not answers():
        if process.poll() is not None:
            raise NotStarted(f"{process.args!r} ended with {process.returncode}\n{_end_of(log)}")
        if time.monotonic() > until:
            raise NotStarted(f"{process.args!r} not up in {seconds:.0f} s\n{_end_of(log)}")
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody listens on this loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end_of(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
