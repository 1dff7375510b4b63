"""What lies between the two ends: the in-memory transport, with a network that misbehaves.

Messages travel through `ChaoticWriter._travel`, frames through `Chaos.post`; both ask the game
what strikes them. A dead process says nothing more, and what it posted lands all the same.
"""

from __future__ import annotations

import asyncio
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import msgspec

from tests.chaos.handoffs.plot import STALL_SECONDS
from tests.chaos.handoffs.rival import Rival
from tests.chaos.schedule import Fault
from transfer.contract import KVSlice, Receipt, Source
from transfer.convert import Frame
from transfer.errors import LandingGone, PeerLost, PeerMisbehaved, TransferError
from transfer.landings import Expected
from transfer.layout import Endpoint, Epoch, KVLayout, Landing
from transfer.memory import MemoryReceiver, MemorySender, MemoryWriter

if TYPE_CHECKING:
    from tests.chaos.handoffs.game import Game
    from tests.chaos.handoffs.handoff import Handoff
    from tests.chaos.handoffs.workers import Decode, Prefill

POLL_SECONDS = 0.05
LONG_SECONDS = 1.6


def chaotic(game: Game, worker: Decode, rail: int) -> Chaos:
    """A receiver of `worker` whose network misbehaves."""
    return _chaotic(game.parts.receiver)(game, worker, rail)


@cache
def _chaotic(receiver: type[MemoryReceiver]) -> Any:
    return type("ChaoticReceiver", (Chaos, receiver), {})


class Chaos(MemoryReceiver):
    """Mixed into a receiver: frames meet what the schedule has for them."""

    def __init__(self, game: Game, worker: Decode, rail: int) -> None:
        super().__init__(game.network, game.layout, name=f"{worker.name}/{rail}")
        self.landings = game.parts.book(game.layout)
        self._claim = self.landings.claim
        self.landings.claim = self._mangled_claim  # type: ignore[method-assign]
        self._game = game
        self.worker = worker
        self._late: set[asyncio.Future[None]] = set()
        self._lingering: set[asyncio.Future[None]] = set()

    def crash(self) -> None:
        """The process is gone: nobody is told anything, and nobody answers."""
        if self._network.receivers.get(self._name) is self:
            del self._network.receivers[self._name]
        for landing_id in list(self.landings._book):
            self.landings.withdraw(landing_id)

    def post(self, entry: Expected, frame: Frame) -> asyncio.Future[None]:
        """One frame leaves; `landed` may be told early, and the frame may land twice or never."""
        game, landing_id = self._game, entry.landing.id
        handoff = game.by_landing[landing_id]
        faults = {it.kind: it.amount for it in game.damage.pop(landing_id, ())}
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        if "drop" in faults:
            return done
        if "truncate" in faults:
            frame = _truncated(frame, faults["truncate"])
        if "corrupt" in faults:
            frame = _corrupted(frame, faults["corrupt"], self.worker.pool.size)
        delay = handoff.latency("frame") + game.held_up(handoff)
        delay += LONG_SECONDS * faults.get("delay", 0.0) + 0.05 * faults.get("reorder", 0.0)
        landed = self._post(entry, frame, delay)
        if "duplicate" in faults:
            self._post(entry, frame, delay + 0.1 * faults["duplicate"])
        if "late" in faults:
            self._late.add(landed)
        early = "reorder" in faults or faults.get("late", 1.0) < 0.5
        return done if early else landed

    async def verify(self, entry: Expected) -> bytes:
        """Verifying takes a while, during which the world goes on."""
        handoff = self._game.by_landing[entry.landing.id]
        for _ in range(2):
            self._game.strike(handoff, "verify")
            await asyncio.sleep(handoff.latency("verify"))
        return await super().verify(entry)

    async def quiesce(self, landing_id: str) -> None:
        """As `MemoryReceiver.quiesce`."""
        handoff = self._game.by_landing[landing_id]
        if handoff.state() == "quarantined":
            self._game.strike(handoff, "quiesce")
        await super().quiesce(landing_id)
        self._game.tell(f"{handoff}: quiet at {self._name}")

    def acknowledge(self, writer: MemoryWriter) -> None:
        """It travels, too. The stalled do not say it; of the dead it is known in the end."""
        handoff = self._game.by_landing[writer._landing.id]
        sender = self._game.rivals.get(writer, handoff.push_worker)
        release = partial(super().acknowledge, writer)
        if sender is not None and sender.stalled and not sender.dead:
            sender.unacknowledged.append(release)
        else:
            self._game.later(handoff.latency("released"), release)

    def _post(self, entry: Expected, frame: Frame, delay: float) -> asyncio.Future[None]:
        self._delay_seconds = delay
        landed = super().post(entry, frame)
        handoff = self._game.by_landing[entry.landing.id]
        self._game.later(delay / 2, self._game.strike, handoff, "flight")
        return landed

    def _land(self, entry: Expected, frame: Frame, data: Any, landed: Any) -> None:
        if landed in self._late:
            seconds = POLL_SECONDS
            if entry.state == "over":
                self._late.discard(landed)
                seconds = self._game.by_landing[entry.landing.id].latency("late", 0.6)
            self._game.later(seconds, self._land, entry, frame, data, landed)
            return
        handoff = self._game.by_landing[entry.landing.id]
        sender = self._game.rivals.get(entry.writer, handoff.push_worker)
        if sender is not None and sender.stalled and landed not in self._lingering:
            self._lingering.add(landed)
            seconds = handoff.latency("linger", 2.0)
            self._game.later(seconds, self._land, entry, frame, data, landed)
            return
        self._game.checks.write(self.worker, entry, frame)
        super()._land(entry, frame, data, landed)

    def _mangled_claim(
        self, landing_id: str, epoch: Epoch, secret: bytes, writer: object
    ) -> Expected:
        """What was shown may have been damaged on the way."""
        shown = self._game.mangled.pop(landing_id, None) or (landing_id, epoch, secret)
        entry = self._claim(*shown, writer)
        self._game.checks.claim(entry, shown[1], shown[2])
        return entry


class ChaoticSender:
    """A prefill worker's sender; one rail of the peer is chosen for each handoff."""

    def __init__(self, game: Game, worker: Prefill) -> None:
        self.game = game
        self.worker = worker
        self.inner: MemorySender = game.parts.sender(game.network)
        self.writers: list[ChaoticWriter | Rival] = []

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """As `Sender.connect`."""
        return await self.inner.connect(endpoint, source, target)

    async def open(self, landing: Landing, source: Source) -> ChaoticWriter:
        """As `Sender.open`."""
        handoff = self.game.by_landing[landing.id]
        writer = ChaoticWriter(self, handoff)
        await writer.begin(landing, source)
        self.writers.append(writer)
        return writer

    async def close(self) -> None:
        """As `Sender.close`."""
        await self.inner.close()


class ChaoticWriter:
    """The sender's end of one handoff, with the line that it uses."""

    def __init__(self, sender: ChaoticSender, handoff: Handoff) -> None:
        self.handoff = handoff
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sender = sender
        self._game = sender.game
        self._inner: MemoryWriter | None = None
        self._ghost: MemoryWriter | None = None
        self._over = False
        self._landing: Landing | None = None

    # ---- the contract

    async def begin(self, landing: Landing, source: Source) -> None:
        """Show the right to the landing, perhaps damaged, perhaps twice."""
        game, handoff = self._game, self.handoff
        faults = await self._travel("open", STALL_SECONDS)
        if "rival" in faults:
            game.rival(handoff, _by(landing, handoff.rail if faults["rival"] < 0.5 else 0))
            await asyncio.sleep(0)  # it is quicker
        for kind in ("corrupt", "truncate"):
            if kind in faults:
                game.mangled[landing.id] = game.forger.right(handoff, kind, faults[kind])
        try:
            self._inner = await self._sender.inner.open(_by(landing, handoff.rail), source)
        finally:
            game.mangled.pop(landing.id, None)
        self._landing = landing
        if "duplicate" in faults:
            rail = handoff.rail if faults["duplicate"] < 0.5 else (handoff.rail + 1) % game.rails
            await self._haunt(landing, source, rail)

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`."""
        faults = await self._travel("write", None, drops=False)
        inner = self._live()
        if "rival" in faults:
            self._game.rival(self.handoff, inner._landing)
        damage = self._game.damage
        damage[inner._landing.id] = [Fault(0, "write", 1, k, a) for k, a in faults.items()]
        try:
            await inner.write(part)
        except PeerMisbehaved:  # the receiver hangs up on whoever leaves the landing
            self.break_off()
            raise PeerLost("the receiver closed the connection") from None
        finally:
            damage.pop(inner._landing.id, None)
        if self._ghost is not None:
            await self._ghost_writes(part)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`; once it has arrived, it goes on without us."""
        async with asyncio.timeout(seconds):
            faults = await self._travel("commit", None)
            inner = self._live()
            self._game.forger.proof(self.handoff, inner, faults)
            commits = [self._game.spawn(inner.commit(note, seconds))]
            if "duplicate" in faults:
                commits.append(self._game.spawn(inner.commit(note, seconds)))
            await asyncio.wait(commits[:1])
            faults = await self._travel("answer", None, back=True)
            if faults.keys() & {"corrupt", "truncate"}:
                self.break_off()
                raise PeerLost("the answer is not a message")
            self._over = True
            return await commits[0]

    async def abort(self) -> None:
        """As `Writer.abort`."""
        over, self._over = self._over, True
        inner = self._inner
        if inner is None:
            return
        if over:
            await inner.abort()
            return
        try:
            async with asyncio.timeout(STALL_SECONDS):
                faults = await self._travel("abort", STALL_SECONDS)
        except (PeerLost, TimeoutError):
            self._hear_of_loss_later()
            return
        if faults.keys() & {"corrupt", "truncate"}:
            self.break_off()
            return
        await inner.abort()
        if "duplicate" in faults:
            await inner.abort()
        if self._ghost is not None:
            await self._ghost.abort()

    # ---- the line

    def break_off(self) -> None:
        """The line breaks, and sooner or later both ends hear of it."""
        if not self.lost.done():
            self.lost.set_result(None)
        self._hear_of_loss_later()

    def peer_gone(self) -> None:
        """The receiving end hears that the line is lost."""
        for writer in (self._inner, self._ghost):
            if writer is not None:
                writer.lose(PeerLost("the connection broke"))

    def _hear_of_loss_later(self) -> None:
        seconds = self.handoff.latency("loss", 0.4)
        asyncio.get_running_loop().call_later(seconds, self.peer_gone)

    def _live(self) -> MemoryWriter:
        if self._over or self._inner is None:
            raise LandingGone("this writer is over")
        return self._inner

    async def _travel(
        self, point: str, patience: float | None, *, back: bool = False, drops: bool = True
    ) -> dict[str, float]:
        """A message is on its way; returns the faults that its content met.

        Raises:
            PeerLost: the line broke.
        """
        await asyncio.sleep(self.handoff.latency(point))
        faults = {it.kind: it.amount for it in self._game.strike(self.handoff, point)}
        await asyncio.sleep(self.handoff.latency(point))
        if drops and "drop" in faults:
            await self._hold(patience)
            raise PeerLost(f"{point}: nothing was heard")
        if drops and "delay" in faults:
            await self._hold(LONG_SECONDS * faults["delay"])
        while (stopped := self._sender.worker.stopped_until - self._game.now) > 0:
            await self._hold(stopped)
        if (held_up := self._game.held_up(self.handoff, back=back)) > 0:
            await self._hold(min(held_up, STALL_SECONDS))
            if held_up > STALL_SECONDS:
                self.break_off()
        if self._inner is not None and self._inner._receiver.worker.dead:
            await self._hold(None)
        if self.lost.done():
            raise PeerLost("the connection broke")
        return faults

    async def _hold(self, seconds: float | None) -> None:
        """Wait, but no longer than the line lasts."""
        await asyncio.wait((self.lost,), timeout=seconds)
        if self.lost.done():
            raise PeerLost("the connection broke")

    # ---- a second writer that shows the same right

    async def _haunt(self, landing: Landing, source: Source, rail: int) -> None:
        try:
            self._ghost = await self._sender.inner.open(_by(landing, rail), source)
        except TransferError:
            self._ghost = None

    async def _ghost_writes(self, part: KVSlice) -> None:
        """Its frames are posted; nobody waits for them."""
        ghost, game, handoff = self._ghost, self._game, self.handoff
        assert ghost is not None
        amount = game.dice("ghost", handoff.number, part.layer, part.start)
        game.damage[handoff.landing_id] = [Fault(0, "write", 1, "delay", 0.2 * amount)]

        async def write() -> None:
            try:
                await ghost.write(part)
            except TransferError:
                self._ghost = None

        game.spawn(write())
        await asyncio.sleep(0)
        game.damage.pop(handoff.landing_id, None)


def _by(landing: Landing, rail: int) -> Landing:
    """The landing, reached by one of its rails."""
    return msgspec.structs.replace(landing, endpoints=(landing.endpoints[rail],))


def _truncated(frame: Frame, amount: float) -> Frame:
    """The last run loses some of its bytes, at least one number of them."""
    lengths = frame.lengths.copy()
    lost = max(4, int(amount * lengths[-1]) // 4 * 4)
    if lost >= lengths[-1]:
        if len(lengths) == 1:
            lost = int(lengths[-1]) // 2
        else:
            cut = int(lengths[:-1].sum())
            return Frame(frame.layer, frame.offsets[:-1], lengths[:-1], frame.data[:cut])
    lengths[-1] -= lost
    return Frame(frame.layer, frame.offsets, lengths, frame.data[: int(lengths.sum())])


def _corrupted(frame: Frame, amount: float, pool_bytes: int) -> Frame:
    """A bit flips in the data, runs change places, or an offset is wrong."""
    variant, place = int(amount * 4), (amount * 4) % 1
    data, offsets = frame.data.copy(), frame.offsets.copy()
    if variant == 0 or (variant == 1 and not _exchange(offsets, frame.lengths)):
        at = int(place * data.size * 8)
        data[at // 8] ^= 1 << at % 8
    elif variant == 2:
        offsets[-1] = int(place * (pool_bytes // 4)) * 4
    elif variant == 3:
        offsets[0] = (pool_bytes - 4, pool_bytes, -4, 1 << 61)[int(place * 4)]
    return Frame(frame.layer, offsets, frame.lengths, data)


def _exchange(offsets: Any, lengths: Any) -> bool:
    """Two runs of equal length change places; False when there are none."""
    for other in range(1, len(offsets)):
        if lengths[other] == lengths[0]:
            offsets[[0, other]] = offsets[[other, 0]]
            return True
    return False
