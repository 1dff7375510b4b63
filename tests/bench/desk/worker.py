"""One worker, as `baton worker` runs it but for Redis; its link to others can be made slow.

    python -m tests.bench.desk.worker WORKER

WORKER is a `Worker` in JSON.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import uvloop

from backends.host import HostConfig, WorkerHost, load_backend
from backends.host.config import Transport, Wire
from backends.host.peers import Peers
from backends.protocol import Role
from transfer.contract import KVSlice, Probe, Receipt, Sender, Source, Writer
from transfer.errors import PeerLost
from transfer.layout import Endpoint, KVLayout, Landing


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """What runs in one process.

    `link_gbit`: at most so much leaves per second; 0: as much as can. `whole`: nothing leaves
    before all layers are computed. `step_tokens`: a prompt is cut into chunks of so many.
    `inexact`: it says that its continuation is not exact, so that codes may be used.
    """

    role: Role
    socket: str
    backend: str
    options: dict[str, Any]
    threads: int = 1
    step_tokens: int = 4096
    link_gbit: float = 0.0
    whole: bool = False
    transport: Transport = "auto"
    wire: tuple[Wire, ...] = ()
    inexact: bool = False


class Link:
    """An emulated link: a byte leaves when all before it have had their time on the wire."""

    def __init__(self, gbit: float) -> None:
        self.bytes_per_second = gbit * 1e9 / 8
        self._seconds_per_byte = 8e-9 / gbit if gbit else 0.0
        self._free = 0.0

    async def carry(self, size: int) -> None:
        """Return when `size` bytes more would have left."""
        self._free = max(self._free, time.monotonic()) + size * self._seconds_per_byte
        left = self._free - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)


class ShapedSender:
    """A sender behind an emulated link."""

    def __init__(self, inner: Sender, link: Link, whole: bool) -> None:
        self._inner = inner
        self._link = link
        self._whole = whole

    @property
    def lost(self) -> Callable[[Endpoint, PeerLost], None]:
        return self._inner.lost

    @lost.setter
    def lost(self, told: Callable[[Endpoint, PeerLost], None]) -> None:
        self._inner.lost = told

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        return await self._inner.connect(endpoint, source, target)

    async def probe(self, endpoint: Endpoint) -> Probe:
        found = await self._inner.probe(endpoint)
        if not self._link.bytes_per_second:
            return found
        rate = min(found.bytes_per_second, self._link.bytes_per_second)
        return msgspec.structs.replace(found, bytes_per_second=rate)

    async def open(self, landing: Landing, source: Source) -> Writer:
        writer = await self._inner.open(landing, source)
        return ShapedWriter(writer, self._link, landing.layout, self._whole)

    async def close(self) -> None:
        await self._inner.close()


class ShapedWriter:
    """A writer behind an emulated link; with `whole`, one that keeps everything to the end."""

    def __init__(self, inner: Writer, link: Link, layout: KVLayout, whole: bool) -> None:
        self._inner = inner
        self._link = link
        self._token_bytes = layout.token_bytes // layout.layers
        self._kept: list[KVSlice] | None = [] if whole else None

    async def write(self, part: KVSlice) -> None:
        if self._kept is not None:
            self._kept.append(part)
        else:
            await self._write(part)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        for part in self._kept or ():
            await self._write(part)
        return await self._inner.commit(note, seconds)

    async def abort(self) -> None:
        await self._inner.abort()

    async def _write(self, part: KVSlice) -> None:
        await self._inner.write(part)
        await self._link.carry((part.end - part.start) * self._token_bytes)


def main() -> None:
    """Serve until stopped."""
    worker = msgspec.json.decode(sys.argv[1], type=Worker)
    os.environ["OMP_NUM_THREADS"] = str(worker.threads)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))

    class ShapedPeers(Peers):
        def _sender(self, name: str) -> Sender:
            sender = super()._sender(name)
            return ShapedSender(sender, Link(worker.link_gbit), worker.whole)

    config = HostConfig(
        id=worker.role,
        role=worker.role,
        listen=f"unix:{worker.socket}",
        step_tokens=worker.step_tokens,
        transports=(worker.transport,),
        wire=worker.wire,
    )
    peers = ShapedPeers if worker.link_gbit or worker.whole else Peers
    backend = load_backend(worker.backend, worker.options)
    if worker.inexact:
        backend.info = msgspec.structs.replace(backend.info, continuation="equivalent")
    host = WorkerHost(config, backend, peers=peers)
    uvloop.run(host.run(lambda: None))


if __name__ == "__main__":
    main()
