"""Baton as a server to be measured: its real processes, with workers that compute nothing.

For `step` two workers of the synthetic backend do prefill and decode, with the real handoff
between them. For `paced` one `worker.py` stands in, whose frames carry one token each. The
gateway has a core to itself; Redis and workers share the core of the load.
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
POOL_TOKENS = 1 << 20
MAX_STREAMS = 2048
SMALL_KV = {"layers": 1, "kv_heads": 1, "head_dim": 8, "pool_tokens": POOL_TOKENS}
BATON = (sys.executable, "-m", "gateway.cli")


def configuration(folder: Path, port: int, interval: float) -> dict[str, Any]:
    """What the gateway and the synthetic workers are told; the rest is as anyone has it."""

    def worker(role: str, **options: Any) -> dict[str, Any]:
        return {
            "role": role,
            "backend": "synthetic",
            "listen": f"unix:{folder}/{role}.sock",
            "max_waiting": MAX_STREAMS,
            "threads": 1,
            "options": {**SMALL_KV, "max_batch": MAX_STREAMS, **options},
        }

    return {
        "deployment": "bench",
        "data_dir": str(folder / "data"),
        "model": {"name": MODEL},
        "gateway": {"port": port},
        "queue": {"max_waiting": MAX_STREAMS},
        "redis": {"url": f"unix://{folder}/redis.sock"},
        "workers": {
            "prefill": worker("prefill"),
            "decode": worker("decode", step_seconds=interval),
        },
    }


@contextmanager
def baton(folder: Path, cores: Cores, pace: Pace, interval: float) -> Iterator[Target]:
    """A gateway that is ready, with its Redis and workers."""
    port = free_port()
    told = configuration(folder, port, interval)
    config = folder / "baton.json"
    workers = {
        name: [*BATON, "worker", "--config", str(config), "--name", name]
        for name in told["workers"]
    }
    if pace == "paced":
        told["workers"] = {}
        words = [f"--redis={told['redis']['url']}", f"--deployment={told['deployment']}"]
        words += [f"--listen={folder}/paced.sock", f"--model={MODEL}", f"--interval={interval}"]
        workers = {"paced": [sys.executable, "-m", "loadtest.bench.worker", *words]}
    config.write_text(json.dumps(told))
    with ExitStack() as stack:
        others = {"redis": (_start_redis(stack, folder, cores),)}
        for name, words in workers.items():
            process = stack.enter_context(running(words, folder / f"{name}.log", cores=cores.rest))
            others[name] = (process.pid,)
        log = folder / "gateway.log"
        words = [*BATON, "gateway", "--config", str(config)]
        gateway = stack.enter_context(running(words, log, cores=cores.server))
        wait_until(lambda: is_ready(port), gateway, log, START_SECONDS)
        yield Target(name="baton", port=port, pids=(gateway.pid,), others=others)


def _start_redis(stack: ExitStack, folder: Path, cores: Cores) -> int:
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
