"""Hand over a prefix whose heads are spread over several pools, on either side.

Every pair of a source shard and a target shard that share heads is a handoff of its own, with a
landing of its own: the same blocks, but `Landing.heads` of their own, and a digest over just those.
`share` says who sends what, `split` makes the landings, `ShardedWriter` is a source shard's end of
all of its handoffs, `Gathering` the target shard's end of all that reach it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from transfer.contract import Arrival, KVSlice, Receipt, Receiver, Sender, Source, Writer
from transfer.errors import LandingGone, LayoutMismatch
from transfer.layout import Landing, Shard
from transfer.pool import Buffer

Result = TypeVar("Result")


def share(sources: Sequence[Shard], target: Shard, turn: int = 0) -> list[Shard | None]:
    """What each of the source shards sends to a target shard: every head once, evenly.

    Those who have the same heads share them; `turn`, say the number of the target shard, decides
    which of them begins, so that single heads do not all come from the same one.

    Raises:
        LayoutMismatch: a head is nowhere.
    """
    shares: list[Shard | None] = [None] * len(sources)
    first = target.first
    while first < target.end:
        holders = [it for it, shard in enumerate(sources) if shard.first <= first < shard.end]
        if not holders:
            raise LayoutMismatch(f"shard: no source has head {first}")
        end = min(max(sources[it].end for it in holders), target.end)
        holders = [it for it in holders if sources[it].end >= end]
        turned = turn % len(holders)
        holders = holders[turned:] + holders[:turned]
        most = -(-(end - first) // len(holders))
        for holder, begin in zip(holders, range(first, end, most), strict=False):
            shares[holder] = Shard(begin, min(most, end - begin))
        first = end
    return shares


def split(landing: Landing, shares: Sequence[Shard | None]) -> list[Landing | None]:
    """A landing for each share: the same blocks, each with an id and a secret of its own."""
    return [
        None
        if heads is None
        else msgspec.structs.replace(
            landing, id=f"{landing.id}.{number}", secret=secrets.token_bytes(16), heads=heads
        )
        for number, heads in enumerate(shares)
    ]


class ShardedWriter:
    """A `Writer` that writes one source shard into several landings, all of them or none."""

    def __init__(self) -> None:
        """Begin with no landing; `open` comes next, and `abort` last, whatever happens."""
        self._writers: list[Writer] = []

    async def open(self, sender: Sender, landing: Landing, source: Source) -> None:
        """Begin the handoff into one more landing; as `Sender.open`."""
        self._writers.append(await sender.open(landing, source))

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`, into every landing."""
        await _all(writer.write(part) for writer in self._writers)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`, of every landing. The answer is the first that is not empty."""
        receipts = await _all(writer.commit(note, seconds) for writer in self._writers)
        return Receipt(
            max((it.verify_seconds for it in receipts), default=0.0),
            next((it.answer for it in receipts if it.answer), b""),
            sum(it.bytes for it in receipts),
        )

    async def abort(self) -> None:
        """As `Writer.abort`, of every landing."""
        await _all(writer.abort() for writer in self._writers)


class Gathering:
    """The landings that together fill one target shard's blocks.

    Its owner is told once: `arrived` when all have arrived, `failed` when the first fails. Until
    then the writers of the others get an empty answer. What has failed must be withdrawn.
    """

    def __init__(
        self,
        receiver: Receiver,
        landing: Landing,
        parts: Sequence[Landing],
        *,
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
    ) -> None:
        """`parts` are what `split` made of `landing`."""
        self._receiver = receiver
        self._landing = landing
        self._parts = parts
        self._missing = {part.id for part in parts}
        self._over = False
        self._seconds, self._bytes = 0.0, 0
        self._owner = arrived, failed

    def expect(self, pool: Buffer, touched: Callable[[], None]) -> None:
        """As `Receiver.expect`, of all parts."""
        for part in self._parts:
            self._receiver.expect(
                part, pool, touched=touched, arrived=self._arrived, failed=self._failed
            )

    def withdraw(self) -> None:
        """As `Receiver.withdraw`, of all parts."""
        self._over = True
        for part in self._parts:
            self._receiver.withdraw(part.id)

    async def quiesce(self) -> None:
        """As `Receiver.quiesce`, of all parts."""
        await _all(self._receiver.quiesce(part.id) for part in self._parts)

    def _arrived(self, arrival: Arrival) -> bytes:
        if self._over:
            raise LandingGone(f"landing {self._landing.id} is over")
        self._missing.discard(arrival.landing)
        self._seconds += arrival.verify_seconds
        self._bytes += arrival.bytes
        if self._missing:
            return b""
        self._over = True
        landing = self._landing
        return self._owner[0](
            Arrival(landing.id, landing.epoch, arrival.note, self._seconds, self._bytes)
        )

    def _failed(self, reason: BaseException) -> None:
        if not self._over:
            self._over = True
            self._owner[1](reason)


async def _all(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await all at once; when one fails, cancel the others and raise what it raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]
