"""The reference servers, started for one measurement each: nginx and the bare proxy.

Both stand before the same upstream, on the core that a gateway under test would have. A `Target`
is whatever answers on a port, with the processes whose CPU time counts as its own.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from loadtest.bench.process import accepts, free_port, running, wait_until
from loadtest.bench.upstream import Pace

START_SECONDS = 15.0


class Cores(msgspec.Struct, frozen=True):
    """Where things run: the server under test alone, everything else elsewhere; None: anywhere."""

    server: frozenset[int] | None
    rest: frozenset[int] | None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Something to load. `others` are processes that work for it, on the load's own core."""

    name: str
    port: int
    pids: tuple[int, ...]
    others: Mapping[str, tuple[int, ...]]


NGINX_CONFIG = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 65536;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 10000000;
  upstream engine {{
    server 127.0.0.1:{upstream};
    keepalive 2048;
    keepalive_requests 10000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


def nginx_program() -> str | None:
    """Where nginx is, if it is installed. Debian keeps it off an ordinary user's PATH."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def upstream(folder: Path, cores: Cores, pace: Pace, interval: float) -> Iterator[tuple[int, int]]:
    """The server behind the proxies; its port and process."""
    port = free_port()
    log = folder / "upstream.log"
    command = [sys.executable, "-m", "loadtest.bench.upstream", f"--port={port}"]
    command += [f"--pace={pace}", f"--interval={interval}"]
    with running(command, log, cores=cores.rest) as process:
        wait_until(lambda: accepts(port), process, log, START_SECONDS)
        yield port, process.pid


@contextmanager
def nginx(folder: Path, cores: Cores, pace: Pace, interval: float) -> Iterator[Target]:
    """An nginx as a reverse proxy with buffering off and connections kept, as one process."""
    program = nginx_program()
    assert program is not None
    with upstream(folder, cores, pace, interval) as (upstream_port, upstream_pid):
        port = free_port()
        config = folder / "nginx.conf"
        config.write_text(NGINX_CONFIG.format(folder=folder, port=port, upstream=upstream_port))
        log = folder / "nginx.log"
        command = [program, "-e", "stderr", "-p", str(folder), "-c", str(config)]
        with running(command, log, cores=cores.server) as process:
            wait_until(lambda: accepts(port), process, log, START_SECONDS)
            yield Target(
                name="nginx",
                port=port,
                pids=(process.pid,),
                others={"upstream": (upstream_pid,)},
            )


@contextmanager
def bare_proxy(folder: Path, cores: Cores, pace: Pace, interval: float) -> Iterator[Target]:
    """The least that a Python proxy can do."""
    with upstream(folder, cores, pace, interval) as (upstream_port, upstream_pid):
        port = free_port()
        log = folder / "proxy.log"
        command = [sys.executable, "-m", "loadtest.bench.proxy"]
        command += [f"--port={port}", f"--upstream-port={upstream_port}"]
        with running(command, log, cores=cores.server) as process:
            wait_until(lambda: accepts(port), process, log, START_SECONDS)
            yield Target(
                name="bare proxy",
                port=port,
                pids=(process.pid,),
                others={"upstream": (upstream_pid,)},
            )
