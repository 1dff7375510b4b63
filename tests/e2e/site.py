"""A whole Baton in real processes, as `baton serve` starts it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
from redis import Redis as BlockingRedis

from gateway.leash import leashed
from tests.support.patience import PATIENCE_SECONDS
from tests.support.ports import free_port

SYNTHETIC = {
    "layers": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "verify_kv": True,
    "step_seconds": 0.01,
    "pool_tokens": 65536,
    "context_tokens": 8192,
}
PREFILL = {"block_tokens": 32, "axes": "layer kv block token head dim"}
DECODE = {"block_tokens": 16, "axes": "block layer kv head token dim"}


def worker(role: str, backend: str, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": role, "backend": backend, "options": options, **more}


def synthetic(**options: Any) -> dict[str, Any]:
    """A prefill and a decode worker that compute nothing."""
    shape = {**SYNTHETIC, **options}
    return {
        "prefill": worker("prefill", "synthetic", {**shape, **PREFILL}),
        "decode": worker("decode", "synthetic", {**shape, **DECODE}),
    }


def toml(tree: dict[str, Any]) -> str:
    """`tree` as TOML; JSON's strings, numbers, lists and booleans are TOML's too."""

    def lines(table: dict[str, Any], path: str) -> Iterator[str]:
        if path:
            yield f"[{path}]"
        for name, value in table.items():
            if not isinstance(value, dict):
                yield f"{name} = {json.dumps(value)}"
        for name, value in table.items():
            if isinstance(value, dict):
                yield from lines(value, f"{path}.{name}" if path else name)

    return "\n".join(lines(tree, "")) + "\n"


class Site:
    """One running `baton serve`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.url = ""

    @property
    def parts(self) -> dict[str, psutil.Process]:
        """The running processes by what they are: gateway, redis, and the workers' names."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "--name" in line and "worker" in line:
                    found[line[line.index("--name") + 1]] = process
                elif "gateway" in line:
                    found["gateway"] = process
                elif line and "-server" in line[0]:  # it rewrites its title
                    found["redis"] = process
        return found

    def kill(self, part: str) -> None:
        self.parts[part].send_signal(signal.SIGKILL)

    def post(self, path: str, body: Any) -> Request:
        headers = {"content-type": "application/json"}
        return Request(self.url + path, json.dumps(body).encode(), headers)

    def request(self, path: str, body: Any = None, seconds: float = 60) -> tuple[int, Any]:
        """Status and decoded body."""
        request = Request(self.url + path) if body is None else self.post(path, body)
        try:
            with urlopen(request, timeout=seconds) as answer:
                raw, status = answer.read(), answer.status
        except HTTPError as error:
            raw, status = error.read(), error.code
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, raw.decode()

    def complete(self, prompt: Any, **more: Any) -> Any:
        body = {"model": self.model, "prompt": prompt, "max_tokens": 16, **more}
        status, answer = self.request("/v1/completions", body)
        assert status == 200, answer
        return answer

    model = "smollm2-135m-instruct"

    def ready(self) -> bool:
        try:
            return self.request("/health/ready", seconds=2)[0] == 200
        except (OSError, HTTPException):
            return False

    def until(self, fact: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < end, f"not within {seconds} s; logs:\n{self.logs()}"
            time.sleep(0.02)

    def balanced(self) -> bool:
        """All workers are there, their books balance and nothing is held."""
        status, book = self.request("/debug/ledger")
        return (
            status == 200
            and book["balanced"]
            and len(book["workers"]) >= 1
            and all(one["free_blocks"] == one["pool_blocks"] for one in book["workers"])
        )

    def redis(self) -> BlockingRedis:
        found = re.search(r"/\S+redis\.sock", " ".join(self.parts["redis"].cmdline()))
        assert found is not None
        return BlockingRedis.from_url(f"unix://{found.group()}")

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:])
            for path in sorted((self.folder / "data" / "logs").glob("*.log"))
        )

    def events(self, part: str, event: str) -> list[dict[str, Any]]:
        """What one process logged under that name."""
        path = self.folder / "data" / "logs" / f"{part}.log"
        found = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == event:
                    found.append(entry)
        return found


@contextlib.contextmanager
def serve(
    folder: Path, tree: dict[str, Any], seconds: float = 120, paths: Sequence[Path] = ()
) -> Iterator[Site]:
    """Start `baton serve` with this configuration; afterwards nothing of it may be left.

    Its processes find modules and plug-ins in `paths` as well.
    """
    config = folder / "baton.toml"
    tree = {"data_dir": str(folder / "data"), **tree}
    tree["gateway"] = {"port": free_port(), **tree.get("gateway", {})}
    config.write_text(toml(tree))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BATON__")}
    known = [str(path) for path in paths] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, known))
    out = folder / "screen.txt"
    with out.open("wb") as screen:
        process = subprocess.Popen(
            leashed([sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)]),
            stdout=screen,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    site = Site(process, folder)
    try:
        end = time.monotonic() + seconds
        while not (match := re.search(r"http://127\.0\.0\.1:\d+", out.read_text())) or (
            "Ctrl-C" not in out.read_text()
        ):
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < end, out.read_text() + site.logs()
            time.sleep(0.05)
        site.url = match.group(0)
        site.until(site.ready)
        yield site
    finally:
        children = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(2 * PATIENCE_SECONDS)
        finally:
            process.kill()
        _, alive = psutil.wait_procs(children, PATIENCE_SECONDS)
        assert not alive, f"left over: {[one.cmdline() for one in alive]}"
