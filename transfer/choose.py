"""Choose how KV travels from this worker to each other one: try what both have, take the fastest.

A choice is made when two workers meet and holds until its connection is lost; then they must meet
again. A handoff uses what was chosen and connects to nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from transfer.coded import codec_of
from transfer.contract import Probe, Sender, Source, Writer
from transfer.errors import LayoutMismatch, PeerLost, TransferError
from transfer.layout import Endpoint, KVLayout, Landing
from transfer.sharded import share

PROBE_SECONDS = 1.0
ONE_HOST = frozenset({"shm", "memory"})
"""Transports that reach nobody on another machine."""


class Peer(NamedTuple):
    """One start of one worker."""

    worker: str
    incarnation: int


class Choice(msgspec.Struct, frozen=True):
    """What was agreed with a peer. `reason` says in one line how all candidates fared.

    `others` are the endpoints of its further pools, over the same transport.
    """

    endpoint: Endpoint
    plan: str
    reason: str
    others: tuple[Endpoint, ...] = ()


class Tried(msgspec.Struct, frozen=True):
    """How one candidate fared: a plan and a measurement, or the refusal."""

    endpoint: Endpoint
    plan: str = ""
    probe: Probe = Probe()
    refusal: TransferError | None = None
    others: tuple[Endpoint, ...] = ()


class Chooser:
    """The senders of one worker by transport, and with which of them each peer is written to.

    `lost` is called when the connection that was chosen for a peer has ended by itself.
    """

    def __init__(
        self, senders: Mapping[str, Sender], lost: Callable[[Peer, PeerLost], None]
    ) -> None:
        """Begin with no peers."""
        self._senders = senders
        self._lost = lost
        self._chosen: dict[Peer, Choice] = {}
        self._meeting: dict[Peer, asyncio.Lock] = {}
        self._gone: dict[Endpoint, PeerLost] = {}  # since the last attempt to connect there
        for sender in senders.values():
            sender.lost = self._on_lost

    async def meet(
        self,
        peer: Peer,
        endpoints: Sequence[Endpoint],
        sources: Sequence[KVLayout],
        targets: Sequence[KVLayout],
    ) -> Choice:
        """Connect to a peer in every way that both have and choose one, unless that was done.

        `sources` are our pools, `targets` its; `Endpoint.shard` says which of those is behind it.

        Raises:
            LayoutMismatch: the pools cannot be converted.
            PeerLost: it cannot be reached in any of them; says why of each.
        """
        lock = self._meeting.setdefault(peer, asyncio.Lock())
        try:
            async with lock:
                if peer not in self._chosen:
                    tried = await self._try_all(endpoints, sources, targets)
                    self._chosen[peer] = choose(peer.worker, tried)
                return self._chosen[peer]
        finally:
            if not lock.locked():
                self._meeting.pop(peer, None)

    async def open(self, landing: Landing, source: Source) -> Writer:
        """As `Sender.open`, over what was chosen for the landing's worker.

        Raises:
            PeerLost: nothing is chosen: they have not met, or lost each other.
        """
        choice = self._chosen.get(Peer(landing.worker, landing.epoch.incarnation))
        if choice is None:
            raise PeerLost(f"worker {landing.worker} has not been met, or was lost again")
        return await self._senders[choice.endpoint.transport].open(landing, source)

    async def close(self) -> None:
        """Close every connection of every sender."""
        self._chosen.clear()
        await asyncio.gather(*(sender.close() for sender in self._senders.values()))

    async def _try_all(
        self,
        endpoints: Sequence[Endpoint],
        sources: Sequence[KVLayout],
        targets: Sequence[KVLayout],
    ) -> list[Tried]:
        known: dict[str, dict[int, Endpoint]] = {}
        for it in endpoints:
            if it.transport in self._senders:
                known.setdefault(it.transport, {})[it.shard] = it
        async with asyncio.TaskGroup() as group:  # one that does not answer holds up no other
            connecting = [
                group.create_task(self._connect(ways, sources, targets)) for ways in known.values()
            ]
        # One after the other: they would disturb each other's measurement.
        measured = [await self._measure(task.result()) for task in connecting]
        return [self._unless_gone(it) for it in measured]

    def _unless_gone(self, tried: Tried) -> Tried:
        """It is refused if a connection has been lost since it was made."""
        gone = [self._gone.pop(it, None) for it in (tried.endpoint, *tried.others)]
        refusal = tried.refusal or next((it for it in gone if it is not None), None)
        return msgspec.structs.replace(tried, refusal=refusal)

    async def _connect(
        self,
        ways: Mapping[int, Endpoint],
        sources: Sequence[KVLayout],
        targets: Sequence[KVLayout],
    ) -> Tried:
        """Connect over one transport to every pool, from each of ours that has to send it heads."""
        first, *others = (ways[it] for it in sorted(ways))
        sender = self._senders[first.transport]
        for endpoint in (first, *others):
            self._gone.pop(endpoint, None)
        lines = []
        try:
            for number, source, target in _pairs(sources, targets):
                if number not in ways:
                    raise PeerLost(f"there is no way to its pool {number}")
                lines.append(await sender.connect(ways[number], source, target))
        except TransferError as error:
            return Tried(first, refusal=error)
        pools = f"{len(sources)} to {len(targets)} pools; " if len(lines) > 1 else ""
        return Tried(first, pools + lines[0], others=tuple(others))

    def _on_lost(self, endpoint: Endpoint, reason: PeerLost) -> None:
        self._gone[endpoint] = reason
        for peer, choice in list(self._chosen.items()):
            if endpoint in (choice.endpoint, *choice.others):
                del self._chosen[peer]
                self._lost(peer, reason)

    async def _measure(self, tried: Tried) -> Tried:
        if tried.refusal is not None:
            return tried
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                probe = await self._senders[tried.endpoint.transport].probe(tried.endpoint)
        except TimeoutError:
            error = PeerLost(f"no measurement within {PROBE_SECONDS:.0f} s")
            return msgspec.structs.replace(tried, refusal=error)
        except TransferError as error:
            return msgspec.structs.replace(tried, refusal=error)
        return msgspec.structs.replace(tried, probe=probe)


def choose(worker: str, tried: Sequence[Tried]) -> Choice:
    """The fastest candidate: by bytes per second, by round trip among those without that figure.

    Raises:
        LayoutMismatch: the pools cannot be converted.
        PeerLost: there is none.
    """
    able = sorted(
        (it for it in tried if it.refusal is None),
        key=lambda it: (-it.probe.bytes_per_second, it.probe.round_trip_seconds),
    )
    refused = [it for it in tried if it.refusal is not None]
    if not able:
        for it in refused:
            # Codes ask for more than numbers do: for equal weights, say.
            if isinstance(it.refusal, LayoutMismatch) and codec_of(it.endpoint.transport) is None:
                raise it.refusal
        why = [f"{it.endpoint.transport}: {it.refusal}" for it in refused]
        raise PeerLost("; ".join(why) or f"{worker} offers no transport that this worker has")
    parts = [", ".join(f"{it.endpoint.transport} {_figure(it.probe)}" for it in able)]
    if any(it.endpoint.transport in ONE_HOST for it in able):
        parts.append("same host")
    parts += [f"{it.endpoint.transport} refused: {it.refusal}" for it in refused]
    return Choice(able[0].endpoint, able[0].plan, "; ".join(parts), able[0].others)


def _pairs(
    sources: Sequence[KVLayout], targets: Sequence[KVLayout]
) -> Iterator[tuple[int, KVLayout, KVLayout]]:
    """Who sends to whom: the number of the target, the source's layout and the target's.

    Raises:
        LayoutMismatch: no source has some head of a target.
    """
    if len(sources) == len(targets) == 1:  # why they do not fit is better said by `plan`
        yield 0, sources[0], targets[0]
        return
    for number, target in enumerate(targets):
        shares = share([it.heads for it in sources], target.heads, number)
        for source, heads in zip(sources, shares, strict=True):
            if heads is not None:
                yield number, source, target


def _figure(probe: Probe) -> str:
    return f"{_rate(probe)} ({probe.note})" if probe.note else _rate(probe)


def _rate(probe: Probe) -> str:
    if not probe.bytes_per_second:
        return f"{probe.round_trip_seconds * 1e3:.2f} ms there and back"
    if probe.bytes_per_second < 1e9:
        return f"{probe.bytes_per_second / 1e6:.0f} MB/s"
    return f"{probe.bytes_per_second / 1e9:.1f} GB/s"
