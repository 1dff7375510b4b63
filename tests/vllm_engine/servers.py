"""Stock vLLM servers on this machine, as their own documentation starts them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from loadtest.bench.process import free_port, running, wait_until

NAME = "m"
START_SECONDS = 300.0
CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


@contextmanager
def server(
    model: Path, folder: Path, *, cores: frozenset[int], dtype: str, hands_over: bool
) -> Iterator[str]:
    """One server that is ready; its address. With `hands_over` it is one of a pair."""
    port = free_port()
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    words += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len", "1024", "--enforce-eager", "--dtype", dtype]
    words += ["--block-size", "32", "--kv-cache-memory-bytes", str(1 << 30)]
    if hands_over:
        words += ["--kv-transfer-config", json.dumps(CONNECTOR)]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(cores)),
        "UCX_TLS": "tcp,self,sm",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }
    log = folder / f"vllm-{port}.log"
    with running(words, log, cores=cores, environment=environment) as process:
        wait_until(lambda: _is_ready(port), process, log, START_SECONDS)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def pair(
    model: Path, folder: Path, *, cores: tuple[frozenset[int], frozenset[int]], dtype: str
) -> Iterator[tuple[str, str]]:
    """A prefill and a decode server. They start together, as each takes half a minute."""

    def enter(mine: frozenset[int]) -> tuple[ExitStack, str]:
        stack = ExitStack()
        one = server(model, folder, cores=mine, dtype=dtype, hands_over=True)
        return stack, stack.enter_context(one)

    with ThreadPoolExecutor(2) as pool, ExitStack() as both:
        starting = [pool.submit(enter, mine) for mine in cores]
        wait(starting)
        for one in starting:
            if one.exception() is None:
                both.push(one.result()[0])
        prefill, decode = (one.result()[1] for one in starting)
        yield prefill, decode


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
