"""Baton as a server to be measured: the real gateway and Redis, with workers that only talk.

The workers (`worker.py`) play a prefill and a decode worker whose tokens of one step share a
frame, or, for `paced`, one whose frames carry one token each. They compute nothing and move no
KV. The gateway has a core to itself; Redis and workers share the core of the load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from gateway.redis_server import command, find_server
from loadtest.bench.process import free_port, running, wait_until
from loadtest.bench.servers import Cores, Target
from loadtest.bench.upstream import Pace

START_SECONDS = 60.0
MODEL = "synthetic"
MAX_STREAMS = 2048
BATON = (sys.executable, "-m", "gateway.cli")


def configuration(folder: Path, port: int) -> dict[str, Any]:
    """What the gateway is told; the rest is as anyone has it."""
    return {
        "deployment": "bench",
        "data_dir": str(folder / "data"),
        "model": {"name": MODEL},
        "gateway": {"port": port},
        "queue": {"max_waiting": MAX_STREAMS},
        "redis": {"url": f"unix://{folder}/redis.sock"},
        "workers": {},
    }


@contextmanager
def baton(folder: Path, cores: Cores, pace: Pace, interval: float) -> Iterator[Target]:
    """A gateway that is ready, with its Redis and workers."""
    port = free_port()
    told = configuration(folder, port)
    config = folder / "baton.json"
    words = [f"--redis={told['redis']['url']}", f"--deployment={told['deployment']}"]
    words += [f"--listen={folder}", f"--model={MODEL}", f"--interval={interval}"]
    words.append(f"--cast={'paced' if pace == 'paced' else 'pair'}")
    config.write_text(json.dumps(told))
    with ExitStack() as stack:
        others = {"redis": (start_redis(stack, folder, cores),)}
        workers = stack.enter_context(
            running(
                [sys.executable, "-m", "loadtest.bench.worker", *words],
                folder / "workers.log",
                cores=cores.rest,
            )
        )
        others["workers"] = (workers.pid,)
        log = folder / "gateway.log"
        words = [*BATON, "gateway", "--config", str(config)]
        gateway = stack.enter_context(running(words, log, cores=cores.server))
        wait_until(lambda: is_ready(port), gateway, log, START_SECONDS)
        yield Target(name="baton", port=port, pids=(gateway.pid,), others=others)


def start_redis(stack: ExitStack, folder: Path, cores: Cores) -> int:
    """The Redis of the gateway under test; its process."""
    data, socket, log = folder / "data", folder / "redis.sock", folder / "redis.log"
    data.mkdir()
    words = command(find_server(), data, socket)
    redis = stack.enter_context(running(words, log, cores=cores.rest))
    wait_until(socket.exists, redis, log, START_SECONDS)
    return redis.pid


def is_ready(port: int) -> bool:
    """Whether a Baton on this port says that it would answer a request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
