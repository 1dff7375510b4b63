"""A gateway that lets everybody in at once: all of Baton but its queue, to see what that costs."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from gateway.admission import Admission, Grant, Ticket
from gateway.cli.model import find_model
from gateway.quota import Quota
from gateway.server import serve_gateway
from gateway.settings import load


class _Free(Grant):
    """A right that nobody knows of."""

    def __init__(self) -> None:
        pass

    def prefilled(self) -> None:
        pass


class NoQueue(Admission):
    """Every turn is now."""

    available = True
    waiting = 0

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def until_available(self) -> None:
        return

    @asynccontextmanager
    async def turn(
        self,
        ticket: Ticket,
        *,
        told: Callable[[Quota], None] | None = None,
        generated: Callable[[], int] = int,
    ) -> AsyncGenerator[Grant]:
        yield _Free()


async def _serve(told: dict[str, object]) -> None:
    config = load(flags=told, environ={}, with_workers=False)
    serving = asyncio.ensure_future(serve_gateway(config, ready=print, queue=NoQueue))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    await asyncio.wait([serving])


def main() -> None:
    """The command line: a configuration as JSON, its settings by dotted path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    told = json.loads(parser.parse_args().config.read_text())
    told["model.source"] = str(find_model("bundled"))
    uvloop.run(_serve(told))


if __name__ == "__main__":
    main()
