"""The plug-in in a process of its own: computing, or hosted by a worker whose step hangs.

`python -m backends.testing.child` is that process; it reads a `Task` and answers on its standard
output.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence as Items
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, Literal

import msgspec

from backends.api import Logprob, Output, Ready, Row, Sampled, Sampling
from backends.testing.desk import Desk
from backends.testing.form import Broken
from backends.testing.making import Maker
from backends.testing.site import Lent, say, site

PATIENCE_SECONDS = 180.0
STEP_SECONDS = 0.5
GONE_SECONDS = 3.0


class Task(msgspec.Struct, frozen=True):
    """What the process is to do."""

    kind: Literal["compute", "hang"]
    name: str
    options: dict[str, Any]
    prompts: list[list[int]]
    steps: int
    sampling: Sampling


class Said(msgspec.Struct, frozen=True, array_like=True):
    """A sampled token, as it is answered."""

    token: int
    logprob: Logprob | None


def run_again(
    maker: Maker, prompts: list[list[int]], steps: int, sampling: Sampling
) -> list[list[Sampled]]:
    """What the plug-in says in a new process.

    Raises:
        Broken: that process fails, does not end, or leaves something behind.
    """
    task = Task("compute", maker.name, maker.options, prompts, steps, sampling)
    code, out, errors, group = _run(task)
    if code:
        raise Broken(f"a new process: it ended with {code}: {errors[-1:]}")
    left_alone(group)
    lines = msgspec.json.decode(out.splitlines()[-1], type=list[list[Said]])
    return [[Sampled(it.token, it.logprob) for it in line] for line in lines]


def run_hanging(maker: Maker, prompt: list[int]) -> tuple[int, int]:
    """Exit code and process group of a worker around the plug-in whose step never returns.

    Raises:
        Broken: it does not end.
    """
    task = Task("hang", maker.name, maker.options, [prompt], 2, Sampling())
    code, _, _, group = _run(task)
    return code, group


def left_alone(group: int) -> None:
    """Make sure that nothing of that process group is left.

    Raises:
        Broken: something is; it is ended.
    """
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    raise Broken(
        "its process ended and left others behind, which hold the device; have them end with their "
        "parent, for example by PR_SET_PDEATHSIG or by reading a pipe that it holds"
    )


def _run(task: Task) -> tuple[int, bytes, list[str], int]:
    """Exit code, output, lines of errors and process group; none of it waits for grandchildren."""
    with (
        TemporaryDirectory(prefix="baton-kit-") as scratch,
        TemporaryFile() as given,
        TemporaryFile() as out,
        TemporaryFile() as errors,
    ):
        given.write(msgspec.json.encode(task))
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "backends.testing.child"],
            stdin=given,
            stdout=out,
            stderr=errors,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(it for it in sys.path if it),
                "TMPDIR": scratch,  # a process that is to hang does not tidy up
            },
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Broken(
                f"a new process: it did not end within {PATIENCE_SECONDS:.0f} s; leave no thread "
                "behind that is no daemon, and end what `close` must"
            ) from None
        out.seek(0)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
        return code, out.read(), lines, process.pid


def _main() -> None:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    backend = Maker.of(task.name, task.options).make()
    if task.kind == "hang":
        asyncio.run(_hang(backend, task))
        return
    desk = Desk(backend)
    lines = [desk.run(prompt, task.steps, sampling=task.sampling) for prompt in task.prompts]
    desk.close()
    said = [[Said(it.token, it.logprob) for it in line] for line in lines]
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(said) + b"\n")


class Stuck(Lent):
    """Computes for ever."""

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """Never return."""
        threading.Event().wait()
        return []


async def _hang(backend: Any, task: Task) -> None:
    stuck = Stuck(backend)
    async with site() as here:
        wire = await here.start("both", stuck, step_timeout_seconds=STEP_SECONDS)
        await say(wire, here.spec(task.prompts[0], task.sampling, task.steps))


if __name__ == "__main__":
    _main()
