"""`baton gateway`: the HTTP side in a process of its own."""

from __future__ import annotations

import asyncio
import signal

import msgspec
import uvloop

from gateway.cli.model import find_model
from gateway.cli.status import Reporter
from gateway.config import Config
from gateway.settings import ConfigError, Problem


def run_gateway(config: Config, reporter: Reporter) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: the model's files are not there.
    """
    try:
        source = str(find_model(config.model.source))
    except ValueError as error:
        raise ConfigError(Problem("model.source", "", str(error))) from error
    model = msgspec.structs.replace(config.model, source=source)
    uvloop.run(_serve(msgspec.structs.replace(config, model=model), reporter))


async def _serve(config: Config, reporter: Reporter) -> None:
    from gateway.server import serve_gateway

    reporter.progress("starting", 0.0)
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(serve_gateway(config, ready=reporter.ready))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, serving.cancel)
