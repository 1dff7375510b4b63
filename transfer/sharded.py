"""Hand over a prefix whose heads are spread over several pools, on either side.

Every pair of a source pool and a target pool that share heads is a handoff of its own, with a
landing of its own: the same blocks, but `Landing.heads` of their own, and a digest over just those.
`share` says who sends what, `parts_of` puts it into the landing that is granted, `pieces` takes the
landings out again at either end. `ShardedWriter` is the source's end of all of them, `Gathering`
the target's.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from transfer.contract import Arrival, KVSlice, Opener, Receipt, Source, Writer
from transfer.errors import LandingGone, LayoutMismatch, PeerMisbehaved
from transfer.layout import KVLayout, Landing, Part, Shard

Result = TypeVar("Result")

SECRET_BYTES = 16


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


def parts_of(sources: Sequence[Shard], targets: Sequence[KVLayout]) -> tuple[Part, ...]:
    """The parts of a landing for these pools; none where there is one on either side.

    Raises:
        LayoutMismatch: no source has some head of a target.
    """
    if len(sources) == len(targets) == 1:
        return ()
    return tuple(
        Part(source, target, layout.shard, heads, secrets.token_bytes(SECRET_BYTES))
        for target, layout in enumerate(targets)
        for source, heads in enumerate(share(sources, layout.heads, target))
        if heads is not None
    )


class Piece(NamedTuple):
    """One handoff of a landing: from which of the source's pools, into which of the target's."""

    source: int
    target: int
    landing: Landing


def pieces(landing: Landing) -> list[Piece]:
    """The landings that make up one: itself, or one for each of its parts.

    Raises:
        PeerMisbehaved: a part is for heads that there are not.
    """
    if not landing.parts:
        return [Piece(0, 0, landing)]
    try:
        return [_piece(landing, number, part) for number, part in enumerate(landing.parts)]
    except ValueError as error:
        raise PeerMisbehaved(f"landing {landing.id}: {error}") from error


def _piece(landing: Landing, number: int, part: Part) -> Piece:
    mine = msgspec.structs.replace(
        landing,
        id=f"{landing.id}.{number}",
        secret=part.secret,
        endpoints=tuple(it for it in landing.endpoints if it.shard == part.target),
        layout=msgspec.structs.replace(landing.layout, shard=part.shard),
        heads=part.heads,
        parts=(),
    )
    return Piece(part.source, part.target, mine)


class ShardedWriter:
    """A `Writer` that writes a source's pools into several landings, all of them or none."""

    def __init__(self) -> None:
        """Begin with no landing; `open` comes next, and `abort` last, whatever happens."""
        self._writers: list[Writer] = []

    async def open(self, opener: Opener, landing: Landing, source: Source) -> None:
        """Begin the handoff into one more landing; as `Opener.open`."""
        self._writers.append(await opener.open(landing, source))

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`, into every landing."""
        await _all(writer.write(part) for writer in self._writers)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`, of every landing. The answer is the first that is not empty.

        Once one has failed its owner withdraws the others, which may be heard before the reason:
        what is raised is rather that.
        """
        ends = await asyncio.gather(
            *(writer.commit(note, seconds) for writer in self._writers), return_exceptions=True
        )
        failures = [it for it in ends if isinstance(it, BaseException)]
        if failures:
            raise next((it for it in failures if not isinstance(it, LandingGone)), failures[0])
        receipts = [it for it in ends if isinstance(it, Receipt)]
        return Receipt(
            max((it.verify_seconds for it in receipts), default=0.0),
            next((it.answer for it in receipts if it.answer), b""),
            sum(it.bytes for it in receipts),
        )

    async def abort(self) -> None:
        """As `Writer.abort`, of every landing."""
        await _all(writer.abort() for writer in self._writers)


class Gathering:
    """What has arrived of a landing so far. Each of its `pieces` arrives by itself."""

    def __init__(self, landing: Landing) -> None:
        """Begin with nothing."""
        self._landing = landing
        self._missing = {piece.landing.id for piece in pieces(landing)}
        self._arrived: list[Arrival] = []

    def add(self, arrival: Arrival) -> Arrival | None:
        """Take note of a piece; answers with the whole once nothing is missing.

        Raises:
            LandingGone: the pieces do not agree on their note.
        """
        if not self._landing.parts:
            return arrival
        if any(it.note != arrival.note for it in self._arrived):
            raise LandingGone(f"landing {self._landing.id}: its parts come with unlike notes")
        self._arrived.append(arrival)
        self._missing.discard(arrival.landing)
        if self._missing:
            return None
        return Arrival(
            self._landing.id,
            self._landing.epoch,
            arrival.note,
            max(it.verify_seconds for it in self._arrived),
            sum(it.bytes for it in self._arrived),
        )


async def _all(calls: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await all at once; when one fails, cancel the others and raise what it raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]
