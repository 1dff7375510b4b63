"""`baton worker`: one backend in a worker host, with its record in Redis beside it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import structlog
import uvloop

from backends.protocol import join_address, split_address
from gateway.admission import Registration, WorkerRecord, open_redis
from gateway.cli.model import find_model
from gateway.cli.status import Reporter
from gateway.config import Config, WorkerSection
from gateway.credentials import credentials_of
from gateway.redis_server import run_dir
from gateway.settings import ConfigError, Problem, is_wildcard

log = structlog.get_logger()

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_worker(config: Config, name: str, reporter: Reporter) -> None:
    """Load the backend of `[workers.NAME]` and serve until told to stop.

    Raises:
        ConfigError: the backend, its options or the model cannot be used.
    """
    worker = config.workers[name]
    if worker.cpus:
        os.sched_setaffinity(0, worker.cpus)
    if worker.threads:  # numeric libraries read this when they are imported, which is below
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(worker.threads)))

    from backends.errors import BackendMisconfigured, BackendNotFound
    from backends.host import load_backend

    structlog.contextvars.bind_contextvars(worker=name)
    try:
        backend = load_backend(
            worker.backend, _options(config, worker), reporter.progress, role=worker.role
        )
    except (BackendMisconfigured, BackendNotFound) as error:
        raise ConfigError(Problem(f"workers.{name}", "", str(error))) from error
    uvloop.run(_serve(config, name, worker, backend, reporter))


def _options(config: Config, worker: WorkerSection) -> dict[str, Any]:
    """Its options, with the configured model where it needs one and none is named."""
    from backends.host import requires

    options = dict(worker.options)
    if "model" not in options and requires(worker.backend, "model"):
        try:
            options["model"] = str(find_model(config.model.source))
        except ValueError as error:
            raise ConfigError(Problem("model.source", "", str(error))) from error
    return options


def _reachable(address: str, data_host: str) -> str:
    """The control address as gateways on other machines must write it."""
    kind, host, port = split_address(address)
    return join_address(data_host, port) if kind == "tcp" and is_wildcard(host) else address


async def _serve(
    config: Config, name: str, worker: WorkerSection, backend: Any, reporter: Reporter
) -> None:
    from backends.host import HostConfig, WorkerHost

    host_config = HostConfig(
        id=name,
        role=worker.role,
        listen=worker.listen or f"unix:{run_dir(Path(config.data_dir)) / name}.sock",
        data_host=worker.data_host,
        secret=config.security.secret,
        tls=credentials_of(config),
        lease_seconds=worker.lease_seconds,
        drain_seconds=worker.drain_seconds,
        step_tokens=worker.step_tokens,
        step_timeout_seconds=worker.step_timeout_seconds,
        max_waiting=worker.max_waiting,
        transports=worker.transports,
        wire=worker.wire,
        unlike_weights=worker.unlike_weights,
        quarantine_share=worker.quarantine_share,
        socket_dir=str(run_dir(Path(config.data_dir))),
        faults=worker.faults,
        reuse=worker.reuse,
    )
    host = WorkerHost(host_config, backend)
    listening = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, host.drain)
    async with (
        open_redis(config.redis) as redis,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(host.run(listening.set))
        await listening.wait()
        prefill_tokens, decode_tokens = host.record_load()
        record = WorkerRecord(
            id=name,
            incarnation=host.incarnation,
            role=worker.role,
            model=config.model.name,
            address=_reachable(host.address, worker.data_host),
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            layout=backend.info.layout.fingerprint,
            transports=host.transports,
        )
        registration = Registration(
            redis,
            config.deployment,
            record,
            lease_seconds=config.queue.lease_seconds,
            timeout_seconds=config.redis.timeout_seconds,
        )
        tasks.create_task(registration.run(host.draining))
        reporter.ready(host.address)
