"""What can be found wrong before anything is started: files, ports, plug-ins, Redis.

Nothing here loads a model, and `options` alone imports plug-ins. Start with `problems`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from gateway.admission import RedisUnsuitable, open_redis
from gateway.admission.client import check_server
from gateway.cli.model import find_model
from gateway.config import Config, WorkerSection
from gateway.credentials import credentials_of
from gateway.redis_server import RedisNotFound, find_server
from gateway.settings import TLS_FILES, Problem
from gateway.tenants.door import missing_keys

BACKENDS = "baton.backends"


def problems(config: Config) -> list[Problem]:
    """Everything that would keep `baton serve` from working with this configuration."""
    checks = (_model, _backends, _transports, _tls, _data_dir, _port, _redis)
    return [problem for check in checks for problem in check(config)]


def options(config: Config) -> Iterator[Problem]:
    """Options that no plug-in has. One that cannot be imported here is asked nothing."""
    from backends.errors import BackendMisconfigured
    from backends.host.plugins import refuse_unknown

    for name, worker in config.workers.items():
        factory = _imported(worker.backend) if worker.options else None
        if factory is not None:
            try:
                refuse_unknown(worker.backend, factory, worker.options)
            except BackendMisconfigured as error:
                yield Problem(f"workers.{name}.options", "", str(error))


def _imported(backend: str) -> Any:
    """What makes such a backend, if it can be imported here."""
    from backends.host.plugins import find_backend

    try:
        return find_backend(backend).load()
    except Exception:  # foreign code; the worker itself, perhaps on another machine, will say why
        return None


def summary(config: Config) -> str:
    """What the configuration amounts to, for people."""
    redis = config.redis.url.rsplit("@", 1)[-1] or f"embedded ({find_server()})"
    lines = [
        f"model    {config.model.name} from {find_model(config.model.source)}",
        f"gateway  {config.gateway.host}:{config.gateway.port}",
        f"redis    {redis}",
        f"data     {config.data_dir}",
    ]
    lines += [
        f"worker   {name}: {worker.role} on {worker.backend}{_emulated(worker)}"
        for name, worker in config.workers.items()
    ]
    return "\n".join(lines)


def _emulated(worker: WorkerSection) -> str:
    """A mark for a worker whose timing is made up."""
    profile = worker.options.get("profile")
    if profile is None and worker.backend != "synthetic":
        return ""
    return f" (EMULATED: {profile})" if profile is not None else " (EMULATED)"


def port_problem(host: str, port: int) -> str:
    """Why nobody can listen there; empty when one can."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        return f"cannot listen on {host}:{port}: {error.strerror or error}"
    return ""


def _model(config: Config) -> Iterator[Problem]:
    try:
        find_model(config.model.source)
    except ValueError as error:
        yield Problem("model.source", "", str(error))


def _backends(config: Config) -> Iterator[Problem]:
    installed = sorted({point.name for point in entry_points(group=BACKENDS)})
    for name, worker in config.workers.items():
        if worker.backend not in installed:
            message = f"no backend is called {worker.backend!r}; installed: {', '.join(installed)}"
            yield Problem(f"workers.{name}.backend", "", message)
    roles = {worker.role for worker in config.workers.values()}
    for role in ("prefill", "decode"):
        if not roles & {role, "both"}:
            yield Problem("workers", "", f"none of them does {role}")


def _transports(config: Config) -> Iterator[Problem]:
    for name, worker in config.workers.items():
        others = [
            (other, set(one.transports))
            for other, one in config.workers.items()
            if other != name and one.role != "prefill" and worker.role != "decode"
        ]
        ours = set(worker.transports)
        if others and not any({"auto"} & (ours | theirs) or ours & theirs for _, theirs in others):
            message = f"none of them is a transport of {', '.join(other for other, _ in others)}"
            yield Problem(f"workers.{name}.transports", "", message)


def _tls(config: Config) -> Iterator[Problem]:
    missing = False
    for name in TLS_FILES:
        file = getattr(config.security, name)
        if file and not os.access(file, os.R_OK):
            missing = True
            yield Problem(f"security.{name}", "", f"{file} is not a file that can be read")
    credentials = credentials_of(config)
    if credentials is not None and not missing:
        try:
            credentials.server()
        except OSError as error:
            yield Problem("security.tls_certificate", "", f"not usable: {error}")


def _data_dir(config: Config) -> Iterator[Problem]:
    path = Path(config.data_dir)
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        yield Problem("data_dir", "", f"{existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("data_dir", "", f"{existing} is not writable")


def _port(config: Config) -> Iterator[Problem]:
    message = port_problem(config.gateway.host, config.gateway.port)
    if message:
        yield Problem("gateway.port", "", message)


def _redis(config: Config) -> Iterator[Problem]:
    try:
        if config.redis.url:
            yield from filter(None, [asyncio.run(_ask_redis(config))])
        else:
            find_server()
    except (RedisNotFound, RedisUnsuitable) as error:
        yield Problem("redis.url", "", str(error))
    except (RedisError, OSError, ValueError) as error:
        yield Problem("redis.url", "", f"Redis cannot be reached: {error}")


async def _ask_redis(config: Config) -> Problem | None:
    async with asyncio.timeout(config.redis.timeout_seconds), open_redis(config.redis) as redis:
        # The client has already parsed this answer; the queue's own connection reads its text.
        facts = await redis.info("server")
        check_server("\n".join(f"{name}:{value}" for name, value in facts.items()).encode())
        return await missing_keys(config, redis)
