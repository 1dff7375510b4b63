"""Baton's own transports, from `open` to the receipt of `commit`, as a worker uses them.

The landing is expected before the clock starts (what `reserve` costs is another benchmark); each
transfer opens a writer, writes the prefix, all of which is ready, commits and hears the answer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from tests.bench.transfer.cases import Case, is_there
from tests.bench.transfer.memory import source_pool, target_pool
from tests.bench.transfer.transports import receiver_of, sender_of
from transfer.contract import Arrival, KVSlice, Source
from transfer.layout import Endpoint, Epoch, Landing

ANSWER_SECONDS = 60.0


class Receiver:
    """A decode worker's data plane, with landings that are granted at once."""

    def __init__(self, case: Case, *, transport: str, digest: bool = True) -> None:
        self._case = case
        self._pool = target_pool(case, case.target)
        self._receiver = receiver_of(transport, case.target, self._pool, digest=digest)
        self._given = 0
        self._arrivals: asyncio.Queue[Arrival | BaseException] = asyncio.Queue()

    async def offer(self) -> Any:
        await self._receiver.start()
        return msgspec.to_builtins(self._receiver.endpoint)

    async def meet(self, told: None) -> None:
        """The sender comes to us."""

    async def expect(self, count: int) -> list[Any]:
        landings = [self._landing() for _ in range(count)]
        for landing in landings:
            self._receiver.expect(
                landing,
                self._pool,
                touched=lambda: None,
                arrived=self._arrived,
                failed=self._arrivals.put_nowait,
            )
        return [msgspec.to_builtins(landing) for landing in landings]

    async def take(self, count: int) -> None:
        for _ in range(count):
            arrival = await self._arrivals.get()
            if isinstance(arrival, BaseException):
                raise arrival

    def arrived(self) -> bool:
        """Where the layouts are unlike, the digest has said so already."""
        return not self._case.alike or is_there(self._pool, self._case.runs())

    def _arrived(self, arrival: Arrival) -> bytes:
        self._arrivals.put_nowait(arrival)
        return b""

    def _landing(self) -> Landing:
        self._given += 1
        case = self._case
        return Landing(
            id=f"bench-{self._given}",
            epoch=Epoch(1, self._given),
            secret=b"secret of 16 byt",
            worker="bench",
            endpoints=(self._receiver.endpoint,),
            layout=case.target,
            pool_blocks=case.pool_blocks(case.target),
            blocks=case.target_blocks,
            tokens=case.tokens,
            lease_seconds=60.0,
        )


class Sender:
    """A prefill worker's data plane, with a prefix that is computed already."""

    def __init__(self, case: Case, *, transport: str, digest: bool = True) -> None:
        self._case = case
        pool = source_pool(case, case.source)
        self._source = Source(
            case.source, pool, case.pool_blocks(case.source), case.source_blocks, case.tokens
        )
        self._sender = sender_of(transport, pool)

    async def offer(self) -> None:
        """The receiver listens."""

    async def meet(self, told: Any) -> None:
        endpoint = msgspec.convert(told, Endpoint)
        await self._sender.connect(endpoint, self._case.source, self._case.target)

    async def send(self, told: list[Any], count: int) -> list[float]:
        landings = [msgspec.convert(each, Landing) for each in told]
        return [await self._once(landing) for landing in landings]

    async def _once(self, landing: Landing) -> float:
        began = time.perf_counter()
        writer = await self._sender.open(landing, self._source)
        await writer.write(KVSlice(0, 0, self._case.tokens, self._case.shape.layers))
        await writer.commit(b"", ANSWER_SECONDS)
        took = time.perf_counter() - began
        await writer.abort()
        return took
