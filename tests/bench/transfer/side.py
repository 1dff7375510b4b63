"""One of a contender's two processes: does what its parent says, over a Unix socket.

    python -m tests.bench.transfer.side SOCKET send|receive CONTENDER CASE

Every line is a JSON object. The parent asks `meet` once, with what the other side offered, then
any number of times `expect` (receiver: prepare for so many transfers) and `go` (both: do them).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from typing import Any, Protocol

import msgspec
import uvloop

from tests.bench.transfer.cases import Case
from tests.bench.transfer.contenders import CONTENDERS, Contender

LINE_BYTES = 64 << 20

Told = Any
"""What the two halves tell each other: anything that JSON can carry."""


class Half(Protocol):
    """A contender's part in one process. Made with the case and the contender's options."""

    def __init__(self, case: Case, **options: Any) -> None: ...

    async def offer(self) -> Told:
        """Get ready to be reached; what the other half must know for that."""

    async def meet(self, told: Told) -> None:
        """Hear what the other half offered, and connect."""


class Receiving(Half, Protocol):
    """The half with the target pool."""

    async def expect(self, count: int) -> Told:
        """Prepare for `count` transfers; what the sender must know of them."""

    async def take(self, count: int) -> None:
        """Return when `count` transfers have arrived and their sender knows it."""

    def arrived(self) -> bool:
        """Whether what was sent lies in the pool."""


class Sending(Half, Protocol):
    """The half with the source pool."""

    async def send(self, told: Told, count: int) -> list[float]:
        """Do `count` transfers; seconds of each until the other half has confirmed it."""


async def _serve(path: str, role: str, contender: Contender, case: Case) -> None:
    reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES)

    def say(**what: Any) -> None:
        writer.write(json.dumps(what).encode() + b"\n")

    say(role=role)
    try:
        module = importlib.import_module(f"tests.bench.transfer.{contender.module}")
        half = getattr(module, "Sender" if role == "send" else "Receiver")(
            case, **contender.options
        )
        say(offer=await half.offer())
        while line := await reader.readline():
            say(**await _do(half, json.loads(line)))
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        await writer.drain()
        raise


async def _do(half: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Carry out one line."""
    match asked["do"]:
        case "meet":
            await half.meet(asked["told"])
            return {}
        case "expect":
            return {"told": await half.expect(asked["count"])}
        case "take":
            await half.take(asked["count"])
            return {}
        case "send":
            return {"seconds": await half.send(asked["told"], asked["count"])}
        case "cpu":
            return {"cpu": time.process_time()}
        case "check":
            return {"arrived": half.arrived()}
        case other:
            raise ValueError(f"do: {other!r}")


def main() -> None:
    """Serve until the parent hangs up; then end at once, whatever a library's threads do."""
    path, role, name, case = sys.argv[1:]
    status = 1
    try:
        uvloop.run(_serve(path, role, CONTENDERS[name], msgspec.json.decode(case, type=Case)))
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
