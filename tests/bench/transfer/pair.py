"""Start a contender's two processes on a core each, let them meet, and ask them for rounds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from loadtest.bench.figures import ROOT
from loadtest.bench.process import running
from tests.bench.transfer.cases import Case
from tests.bench.transfer.contenders import CONTENDERS

START_SECONDS = 60.0
ROUND_SECONDS = 60.0
ROLES = ("send", "receive")


class LeftOut(Exception):
    """A contender cannot take part; says why and what would help."""


class Round(msgspec.Struct, frozen=True):
    """What one round took: seconds of each transfer, and CPU seconds of all on either side."""

    seconds: list[float]
    sender_cpu: float
    receiver_cpu: float


class Pair:
    """A contender, ready to move one case."""

    def __init__(
        self, name: str, lines: dict[str, Line], processes: list[subprocess.Popen[bytes]]
    ) -> None:
        self._name = name
        self._lines = lines
        self._processes = processes

    def meet(self) -> None:
        """Let both halves meet.

        Raises:
            LeftOut: one of them could not be made.
        """
        offers = {role: self._lines[role].hear()["offer"] for role in ROLES}
        for role, other in zip(ROLES, reversed(ROLES), strict=True):
            self._lines[role].say(do="meet", told=offers[other])
        for role in ROLES:
            self._lines[role].hear()

    def go(self, count: int) -> Round:
        """Move the case `count` times.

        Raises:
            LeftOut: one of the halves failed.
        """
        self._signal(signal.SIGCONT)
        send, receive = self._lines["send"], self._lines["receive"]
        receive.say(do="expect", count=count)
        told = receive.hear()["told"]
        before = self._cpu()
        receive.say(do="take", count=count)
        send.say(do="send", told=told, count=count)
        seconds = send.hear()["seconds"]
        receive.hear()
        after = self._cpu()
        self._signal(signal.SIGSTOP)
        return Round(seconds, after[0] - before[0], after[1] - before[1])

    def wake(self) -> None:
        """Let its processes go on, so that they can end."""
        self._signal(signal.SIGCONT)

    def _cpu(self) -> list[float]:
        for role in ROLES:
            self._lines[role].say(do="cpu")
        return [self._lines[role].hear()["cpu"] for role in ROLES]

    def _signal(self, which: signal.Signals) -> None:
        """Stop those whose threads spin while others are measured, or let them go on."""
        if CONTENDERS[self._name].spins:
            for process in self._processes:
                process.send_signal(which)

    def check(self) -> None:
        """Look whether what was moved is there.

        Raises:
            LeftOut: it is not.
        """
        self._signal(signal.SIGCONT)
        self._lines["receive"].say(do="check")
        if not self._lines["receive"].hear()["arrived"]:
            raise LeftOut(f"{self._name}: the target holds something else")
        self._signal(signal.SIGSTOP)


class Line:
    """The line to one process."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self._name = name
        self._connection = connection
        self._file = connection.makefile("rb")

    def say(self, **what: Any) -> None:
        """Ask for something."""
        self._connection.sendall(json.dumps(what).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            LeftOut: it failed, or took too long.
        """
        try:
            line = self._file.readline()
        except OSError as error:
            raise LeftOut(f"{self._name}: no answer ({error})") from error
        heard: dict[str, Any] = json.loads(line) if line else {"error": "ended by itself"}
        if "error" in heard:
            needs = CONTENDERS[self._name].needs
            hint = f" (needs: {needs})" if needs else ""
            raise LeftOut(f"{self._name}: {heard['error']}{hint}")
        return heard


@contextmanager
def paired(name: str, case: Case, folder: Path, cores: tuple[int, int]) -> Iterator[Pair]:
    """Both processes of a contender, stopped at the end.

    Raises:
        LeftOut: they could not be made.
    """
    contender = CONTENDERS[name]
    with ExitStack() as stack:
        path = Path(tempfile.mkdtemp(dir=folder)) / "control"
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(START_SECONDS)
        processes = []
        for role, core in zip(ROLES, cores, strict=True):
            command = [sys.executable, "-m", "tests.bench.transfer.side", str(path), role, name]
            encoded = msgspec.json.encode(case).decode()
            process = stack.enter_context(
                running(
                    [*command, encoded],
                    path.with_name(f"{role}.log"),
                    cores=frozenset({core}),
                    environment={
                        **contender.environment,
                        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                    },
                )
            )
            processes.append(process)
        lines = {}
        for _ in ROLES:
            connection = _accepted(name, listener)
            stack.enter_context(connection)
            connection.settimeout(ROUND_SECONDS)
            line = Line(name, connection)
            lines[line.hear()["role"]] = line
        pair = Pair(name, lines, processes)
        pair.meet()
        try:
            yield pair
        finally:
            pair.wake()


def _accepted(name: str, listener: socket.socket) -> socket.socket:
    try:
        connection, _ = listener.accept()
    except TimeoutError as error:
        raise LeftOut(f"{name}: a process did not come up in {START_SECONDS:.0f} s") from error
    return connection
