"""The transport within one process, for tests; as nasty as a network card.

A write is posted and lands later, by itself: cancelling the writer does not stop it, nor does
withdrawing the landing. Only `quiesce` says that it is over, which it learns from the sender: told
that a landing is gone, it acknowledges once nothing that it posted can land any more. What a
transport over real hardware must survive, the code above it meets here first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import numpy as np

from transfer.contract import (
    Arrival,
    Buffer,
    KVSlice,
    Probe,
    Proof,
    Receipt,
    Source,
    nobody_cares,
    nobody_minds,
)
from transfer.convert import Conversion, Frame, Tamper, TamperNote, check_part, rest_of
from transfer.digest import PrefixDigest, landing_key, seal
from transfer.errors import LandingGone, PeerLost
from transfer.landings import Expected, Landings
from transfer.layout import Endpoint, KVLayout, Landing, Shard
from transfer.plan import Plan, plan


class MemoryNetwork:
    """What connects the senders and receivers of one process: names."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self.receivers: dict[str, MemoryReceiver] = {}
        self._stuck: list[Callable[[], None]] | None = None

    def find(self, endpoint: Endpoint | None) -> MemoryReceiver:
        """The receiver at `endpoint`.

        Raises:
            PeerLost: nobody is there.
        """
        address = endpoint.address if endpoint is not None else "nowhere"
        receiver = self.receivers.get(address)
        if receiver is None:
            raise PeerLost(f"nobody answers at memory {address}")
        return receiver

    @contextlib.contextmanager
    def stall(self) -> Iterator[None]:
        """While this is open, nothing lands; it does afterwards."""
        stuck: list[Callable[[], None]] = []
        self._stuck = stuck
        try:
            yield
        finally:
            self._stuck = None
            for land in stuck:
                land()

    def deliver(self, land: Callable[[], None]) -> None:
        """Have something land, now or when it can."""
        if self._stuck is None:
            land()
        else:
            self._stuck.append(land)


class MemoryReceiver:
    """Takes writes `delay_seconds` after they were posted."""

    def __init__(
        self,
        network: MemoryNetwork,
        layout: KVLayout,
        *,
        name: str = "decode",
        delay_seconds: float = 0.002,
    ) -> None:
        """Answer to `name` in `network` from now on."""
        self.layout = layout
        self.landings = Landings(layout)
        self._network = network
        self._name = name
        self._delay_seconds = delay_seconds
        self._writers: set[MemoryWriter] = set()  # that have not acknowledged their end
        self.senders: set[MemorySender] = set()
        self.allow_unlike_weights = False
        network.receivers[name] = self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_: object) -> None:
        await self.close()

    @property
    def endpoint(self) -> Endpoint:
        """Where senders reach this receiver."""
        return Endpoint("memory", self._name)

    def expect(
        self,
        landing: Landing,
        pool: Buffer,
        *,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
        claimed: Callable[[], None] = nobody_minds,
        proofs: Sequence[Proof] = (),
    ) -> None:
        """As `Receiver.expect`.

        Raises:
            ValueError: it is expected already, or contradicts the pool or this layout.
        """
        self.landings.expect(landing, pool, touched, arrived, failed, claimed, proofs)

    def withdraw(self, landing_id: str) -> None:
        """As `Receiver.withdraw`; the writer is told. What was posted before still lands."""
        entry = self.landings.withdraw(landing_id)
        if entry is not None and isinstance(entry.writer, MemoryWriter):
            entry.writer.let_go()

    async def quiesce(self, landing_id: str) -> None:
        """As `Receiver.quiesce`: waits for the writer's acknowledgement."""
        while unsure := [it.released for it in self._writers if it.holds(landing_id)]:
            await asyncio.wait(unsure)

    async def close(self) -> None:
        """As `Receiver.close`."""
        self._network.receivers.pop(self._name, None)
        for writer in list(self._writers):
            writer.lose(PeerLost(f"{self._name} was closed"))
        for sender in list(self.senders):
            sender.leave(self)
        if self._writers:
            await asyncio.wait([writer.released for writer in self._writers])

    async def verify(self, entry: Expected) -> bytes:
        """The digest of what lies in the pool; others compute it in a thread, which takes time."""
        return entry.digest()

    def join(self, writer: MemoryWriter) -> None:
        """Tell `writer` when this receiver is closed."""
        self._writers.add(writer)

    def acknowledge(self, writer: MemoryWriter) -> None:
        """Nothing of `writer` can land any more."""
        self._writers.discard(writer)
        writer.released.set_result(None)

    def post(self, entry: Expected, frame: Frame) -> asyncio.Future[None]:
        """Have a frame land later, whatever happens meanwhile; done when it has.

        Raises:
            PeerMisbehaved: the frame leaves the landing.
        """
        entry.check(frame.offsets, frame.lengths)
        loop = asyncio.get_running_loop()
        landed: asyncio.Future[None] = loop.create_future()
        if isinstance(entry.writer, MemoryWriter):
            entry.writer.watch(landed)
        land = partial(self._land, entry, frame, frame.data.copy(), landed)
        loop.call_later(self._delay_seconds, self._network.deliver, land)
        return landed

    def _land(
        self, entry: Expected, frame: Frame, data: Buffer, landed: asyncio.Future[None]
    ) -> None:
        entry.put(data, frame.offsets, frame.lengths)
        if entry.state == "open":
            entry.touched()
        landed.set_result(None)


class MemorySender:
    """Finds receivers by name. `tamper` and `tamper_note` are for drills."""

    def __init__(self, network: MemoryNetwork, *, allow_unlike_weights: bool = False) -> None:
        """Send to the receivers of `network`."""
        self.tamper: Tamper | None = None
        self.tamper_note: TamperNote | None = None
        self.lost: Callable[[Endpoint, PeerLost], None] = nobody_cares
        self._network = network
        self._allow_unlike_weights = allow_unlike_weights
        self._writers: set[MemoryWriter] = set()
        self._met: set[MemoryReceiver] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_: object) -> None:
        await self.close()

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """As `Sender.connect`."""
        agreed = self._plan(source, target)
        receiver = self._network.find(endpoint)
        if receiver.layout != target:
            raise PeerLost(f"{endpoint.address} refused us: it has another layout")
        if not receiver.allow_unlike_weights and source.weights != target.weights:
            raise PeerLost(f"{endpoint.address} refused us: weights: it allows no unlike ones")
        receiver.senders.add(self)
        self._met.add(receiver)
        return agreed.line

    async def probe(self, endpoint: Endpoint) -> Probe:
        """As `Sender.probe`: there is no distance."""
        self._network.find(endpoint)
        return Probe()

    async def open(self, landing: Landing, source: Source) -> MemoryWriter:
        """As `Sender.open`."""
        agreed = self._plan(source.layout, landing.layout, landing.heads)
        endpoint = next((it for it in landing.endpoints if it.transport == "memory"), None)
        receiver = self._network.find(endpoint)
        tampers = self.tamper, self.tamper_note
        writer = MemoryWriter(receiver, agreed, landing, source, *tampers, self._writers.discard)
        self._writers.add(writer)
        return writer

    async def close(self) -> None:
        """As `Sender.close`."""
        for writer in list(self._writers):
            writer.lose(PeerLost("this sender was closed"))
        for receiver in list(self._met):
            self.leave(receiver)

    def leave(self, receiver: MemoryReceiver) -> None:
        """The connection to a receiver has ended."""
        receiver.senders.discard(self)
        self._met.discard(receiver)
        self.lost(receiver.endpoint, PeerLost(f"{receiver.endpoint.address} was closed"))

    def _plan(self, source: KVLayout, target: KVLayout, heads: Shard | None = None) -> Plan:
        return plan(source, target, allow_unlike_weights=self._allow_unlike_weights, heads=heads)


class MemoryWriter:
    """The sender's end of one handoff."""

    def __init__(
        self,
        receiver: MemoryReceiver,
        agreed: Plan,
        landing: Landing,
        source: Source,
        tamper: Tamper | None,
        tamper_note: TamperNote | None,
        ended: Callable[[MemoryWriter], None],
    ) -> None:
        """Show the right to `landing`; a refusal is raised by the first write or commit."""
        self._receiver = receiver
        self._landing = landing
        self._layers = agreed.target.layers
        self._tamper = tamper
        self._tamper_note = tamper_note
        self._ended = ended
        self._conversion = Conversion(agreed, source, landing)
        self._digest = PrefixDigest(
            agreed,
            source.pool,
            source.pool_blocks,
            source.blocks,
            source.tokens,
            landing_key(landing),
        )
        self._error: Exception | None = None
        self._entry: Expected | None = None
        self._posted: set[asyncio.Future[None]] = set()
        self._letting_go = False
        self.released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        receiver.join(self)
        try:
            self._entry = receiver.landings.claim(landing.id, landing.epoch, landing.secret, self)
        except LandingGone as error:
            self._error = error

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`; returns when all of `part` has landed. Each slice is written once."""
        check_part(part, self._layers, self._conversion.tokens)
        entry = self._live()
        rest = rest_of(part, self._landing.present)
        if rest is None:
            entry.touched()
            return
        self._digest.add(rest)
        posted = [self._receiver.post(entry, frame) for frame in self._frames(rest)]
        if posted:
            await asyncio.wait(posted)  # which leaves them alone when it is cancelled

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`."""
        entry = self._live()
        async with asyncio.timeout(seconds):
            await self._landed()
        entry = self._live()
        entry.begin_verifying()
        begun = time.monotonic()
        found = await self._receiver.verify(entry)
        took = time.monotonic() - begun
        self._error = LandingGone(f"landing {self._landing.id} was used already")
        digest = self._digest.result()
        sealed = seal(self._landing, digest, note)
        if self._tamper_note is not None:
            note = self._tamper_note(note)
        try:
            answer = entry.settle(found, digest, sealed, note, took)
        finally:
            self._receiver.landings.forget(entry)
            self.let_go()
        return Receipt(took, answer, entry.moved_bytes)

    async def abort(self) -> None:
        """As `Writer.abort`."""
        self.lose(LandingGone("the sender gave up"))
        await self._landed()

    def lose(self, reason: PeerLost | LandingGone) -> None:
        """Write no more; the landing fails if it is not over yet."""
        self._error = self._error or reason
        self.let_go()
        if self._entry is not None and self._entry.state == "open":
            self._entry.fail(reason)
            self._receiver.landings.forget(self._entry)

    def holds(self, landing_id: str) -> bool:
        """Whether this is the writer of a landing."""
        return self._entry is not None and self._landing.id == landing_id

    def watch(self, landed: asyncio.Future[None]) -> None:
        """Remember what is under way until it has landed."""
        self._posted.add(landed)
        landed.add_done_callback(self._has_landed)

    def let_go(self) -> None:
        """The handoff is over: acknowledge it as soon as nothing is under way."""
        if not self._letting_go:
            self._letting_go = True
            self._ended(self)
            self._acknowledge_if_quiet()

    def _has_landed(self, landed: asyncio.Future[None]) -> None:
        self._posted.discard(landed)
        self._acknowledge_if_quiet()

    def _acknowledge_if_quiet(self) -> None:
        if self._letting_go and not self._posted:
            self._receiver.acknowledge(self)

    async def _landed(self) -> None:
        """Wait for what is under way."""
        while self._posted:
            await asyncio.wait(self._posted)

    def _live(self) -> Expected:
        if self._error is not None:
            raise self._error
        if self._entry is None or self._entry.state != "open":
            raise LandingGone(f"landing {self._landing.id} is over")
        return self._entry

    def _frames(self, part: KVSlice) -> list[Frame]:
        """All frames of a slice, each with bytes of its own."""
        frames = []
        for frame in self._conversion.frames(part):
            own = Frame(frame.layer, frame.offsets, frame.lengths, np.array(frame.data))
            if self._tamper is not None:
                try:
                    damaged = self._tamper(self._landing.id, own)
                except ConnectionError as error:
                    self.lose(PeerLost(f"the connection broke: {error}"))
                    raise PeerLost(f"the connection broke: {error}") from error
            else:
                damaged = own
            if damaged is not None:
                frames.append(damaged)
        return frames
