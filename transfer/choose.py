"""Choose how KV travels from this worker to each other one: try what both have, take the fastest.

A choice is made when two workers meet and holds until its connection is lost; then they must meet
again. A handoff uses what was chosen and connects to nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from transfer.contract import Probe, Sender, Source, Writer
from transfer.errors import LayoutMismatch, PeerLost, TransferError
from transfer.layout import Endpoint, KVLayout, Landing

PROBE_SECONDS = 1.0
ONE_HOST = frozenset({"shm", "memory"})
"""Transports that reach nobody on another machine."""


class Peer(NamedTuple):
    """One start of one worker."""

    worker: str
    incarnation: int


class Choice(msgspec.Struct, frozen=True):
    """What was agreed with a peer. `reason` says in one line how all candidates fared."""

    endpoint: Endpoint
    plan: str
    reason: str


class Tried(msgspec.Struct, frozen=True):
    """How one candidate fared: a plan and a measurement, or the refusal."""

    endpoint: Endpoint
    plan: str = ""
    probe: Probe = Probe()
    refusal: TransferError | None = None


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
        self, peer: Peer, endpoints: Sequence[Endpoint], source: KVLayout, target: KVLayout
    ) -> Choice:
        """Connect to a peer in every way that both have and choose one, unless that was done.

        Raises:
            LayoutMismatch: the pools cannot be converted.
            PeerLost: it cannot be reached in any of them; says why of each.
        """
        lock = self._meeting.setdefault(peer, asyncio.Lock())
        try:
            async with lock:
                if peer not in self._chosen:
                    tried = await self._try_all(endpoints, source, target)
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
        self, endpoints: Sequence[Endpoint], source: KVLayout, target: KVLayout
    ) -> list[Tried]:
        known = [it for it in endpoints if it.transport in self._senders]
        async with asyncio.TaskGroup() as group:  # one that does not answer holds up no other
            connecting = [group.create_task(self._connect(it, source, target)) for it in known]
        # One after the other: they would disturb each other's measurement.
        measured = [await self._measure(task.result()) for task in connecting]
        return [
            it
            if (gone := self._gone.pop(it.endpoint, None)) is None
            else msgspec.structs.replace(it, refusal=it.refusal or gone)
            for it in measured
        ]

    async def _connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> Tried:
        sender = self._senders[endpoint.transport]
        self._gone.pop(endpoint, None)
        try:
            return Tried(endpoint, await sender.connect(endpoint, source, target))
        except TransferError as error:
            return Tried(endpoint, refusal=error)

    def _on_lost(self, endpoint: Endpoint, reason: PeerLost) -> None:
        self._gone[endpoint] = reason
        for peer in [it for it, choice in self._chosen.items() if choice.endpoint == endpoint]:
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
            if isinstance(it.refusal, LayoutMismatch):
                raise it.refusal
        why = [f"{it.endpoint.transport}: {it.refusal}" for it in refused]
        raise PeerLost("; ".join(why) or f"{worker} offers no transport that this worker has")
    parts = [", ".join(f"{it.endpoint.transport} {_figure(it.probe)}" for it in able)]
    if any(it.endpoint.transport in ONE_HOST for it in able):
        parts.append("same host")
    parts += [f"{it.endpoint.transport} refused: {it.refusal}" for it in refused]
    return Choice(able[0].endpoint, able[0].plan, "; ".join(parts))


def _figure(probe: Probe) -> str:
    if not probe.bytes_per_second:
        return f"{probe.round_trip_seconds * 1e3:.2f} ms there and back"
    if probe.bytes_per_second < 1e9:
        return f"{probe.bytes_per_second / 1e6:.0f} MB/s"
    return f"{probe.bytes_per_second / 1e9:.1f} GB/s"
