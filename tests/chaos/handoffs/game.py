"""One schedule of handoffs being played: the world's faults, the gateway's part, the checks."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from functools import cached_property, partial
from typing import Any

import msgspec
import numpy as np

from backends.api import Sampling
from backends.errors import PoolExhausted
from backends.host.handoff import Pushes
from backends.host.janitor import Janitor
from backends.host.landings import Landings as HostLandings
from backends.host.landings import Reserved
from backends.host.ledger import Holder, Ledger
from backends.host.work import Prefilling
from backends.protocol import First, HandedOver, RequestSpec, SequenceSpec
from tests.chaos.coverage import Coverage
from tests.chaos.handoffs import plot, truth
from tests.chaos.handoffs.wire import LONG_SECONDS, blocks_of
from tests.chaos.handoffs.workers import Decode, Prefill, Worker
from tests.chaos.machine import Faults, Violation
from tests.chaos.schedule import Fault, Schedule, draw
from transfer.convert import Frame
from transfer.errors import TransferError
from transfer.landings import Expected, Landings
from transfer.layout import Epoch
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender, MemoryWriter

WORKERS = 2  # of either kind
CONCURRENT = 8


class Parts(msgspec.Struct, frozen=True):
    """The code under test; a mutant has one part exchanged."""

    ledger: type[Ledger] = Ledger
    landings: type[HostLandings] = HostLandings
    janitor: type[Janitor] = Janitor
    pushes: type[Pushes] = Pushes
    receiver: type[MemoryReceiver] = MemoryReceiver
    sender: type[MemorySender] = MemorySender
    book: type[Landings] = Landings


class Handoffs:
    """The scenario: at least eight handoffs at a time, between two workers of either kind."""

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts or Parts()

    def schedule(self, seed: int) -> Schedule:
        """As `Scenario.schedule`."""
        return draw(seed, range(CONCURRENT + seed % 3), plot.MENU, plot.APPROACHES)

    def coverage(self) -> Coverage:
        """As `Scenario.coverage`."""
        return Coverage(plot.MENU, plot.STATES, plot.EXCUSES)

    def game(self, schedule: Schedule, faults: Faults) -> Game:
        """As `Scenario.game`."""
        return Game(self.parts, schedule, faults)


class Handoff:
    """One prefix on its way, and how it ended on either side. The host takes it for its link."""

    def __init__(self, game: Game, number: int) -> None:
        dice = game.dice
        self.game = game
        self.number = number
        self.prompt = dice.below(truth.PROMPTS, "prompt", number)
        self.rail = dice.below(game.rails, "rail", number)
        self.chunk = dice.below(truth.tokens_of(self.prompt) + 1, "chunk", number)
        self.slow = dice("slow", number) < 0.2
        self.far = dice("far", number) < 0.3
        self.gateway_tells = dice("tells", number) < 0.7
        self.decode_seconds = 0.02 + 0.3 * dice("decode", number)
        self.prefill = game.prefills[dice.below(WORKERS, "from", number)].name
        self.decode = game.decodes[dice.below(WORKERS, "to", number)].name
        self.spec = self._spec(1 + dice.below(2, "n", number))
        self.firsts = tuple(First(one.index, number + one.index) for one in self.spec.sequences)
        self.reserved: Reserved | None = None
        self.landing_worker: Decode | None = None
        self.push_worker: Prefill | None = None
        self.work: Prefilling | None = None
        self.sent: str | None = None
        self.received: str | None = None
        self.closed = 0
        self.finished = False
        self.forged = False
        self.disturbed = False
        self.over = asyncio.Event()
        self._latencies: defaultdict[str, int] = defaultdict(int)

    def __str__(self) -> str:
        return f"handoff {self.number}"

    def _spec(self, sequences: int) -> RequestSpec:
        return RequestSpec(
            handle=self.number,
            request=f"r{self.number}",
            prompt=[self.prompt] * truth.tokens_of(self.prompt),
            sequences=tuple(SequenceSpec(index=i, seed=i) for i in range(sequences)),
            sampling=Sampling(),
            max_tokens=8,
            deadline_seconds=plot.DEADLINE_SECONDS,
        )

    # ---- what it is like now

    @property
    def landing_id(self) -> str:
        """The id of its landing, once it has one."""
        return self.reserved.landing.id if self.reserved is not None else ""

    @property
    def worker_died(self) -> bool:
        """Whether the process that granted its landing is dead."""
        return self.landing_worker is not None and self.landing_worker.dead

    def state(self) -> str:
        """One of `plot.STATES`."""
        worker = self.landing_worker
        if worker is None or worker.dead:
            return "dead"
        if self.finished:
            return "finished"
        if self.received == "admitted":
            return "admitted"
        entries = [it.landings._book.get(self.landing_id) for it in worker.receivers]
        live = [it for it in entries if it is not None and it.state != "over"]
        if any(it.state == "verifying" for it in live):
            return "verifying"
        if live:
            return "written" if any(it.writer is not None for it in live) else "granted"
        held = Holder("quarantine", self.landing_id) in worker.ledger._held
        return "quarantined" if held else "freed"

    def latency(self, purpose: str, seconds: float = 0.004) -> float:
        """A short time, never twice the same; longer on the way to a worker that is far away."""
        self._latencies[purpose] += 1
        seconds *= 12 if self.far and purpose in plot.LONG_WAYS else 1
        return seconds * self.game.dice("latency", self.number, purpose, self._latencies[purpose])

    def pace(self, number: int) -> float:
        """How long the `number`-th slice is computed; of a slow one, most of a lease."""
        share = self.game.dice("pace", self.number, number)
        return plot.LEASE_SECONDS * (0.3 + 0.25 * share) if self.slow else 0.01 * share

    # ---- endings

    def send(self, message: Any) -> None:
        """What the prefill worker tells the gateway."""
        if isinstance(message, HandedOver):
            self.sent_ended("handed")

    def sent_ended(self, how: str) -> None:
        """The sending end is told its ending; a second one is a finding."""
        if self.sent is not None and self.sent != "cancelled":
            self.game.blame(f"{self}: sent ended twice: {self.sent}, then {how}")
        self.game.tell(f"{self}: sent: {how}")
        self.sent = self.sent or how
        if how not in ("handed", "cancelled") and self.gateway_tells:
            self.game.later(self.latency("tell", 0.05), self.game.cancel_decode, self)
        self.look()

    def received_ended(self, how: str) -> None:
        """Likewise the receiving end."""
        if self.received is not None:
            self.game.blame(f"{self}: received ended twice: {self.received}, then {how}")
        self.game.tell(f"{self}: received: {how}")
        self.received = how
        if how not in ("admitted", "cancelled") and self.gateway_tells:
            self.game.later(self.latency("tell", 0.05), self.game.cancel_prefill, self)
        self.look()

    def look(self) -> None:
        """Notice whether all is over."""
        work, pusher = self.work, self.push_worker
        quiet = (
            work is None
            or pusher is None
            or pusher.dead
            or (work.ended and not work.busy and work not in pusher.pushes)
        )
        decoded = self.received != "admitted" or self.finished
        if self.sent is not None and self.received is not None and quiet and decoded:
            self.over.set()


class Game:
    """All of one schedule."""

    def __init__(self, parts: Parts, schedule: Schedule, faults: Faults) -> None:
        self.parts = parts
        self.dice = faults.dice
        self.story: list[str] = []
        self.rails = plot.RAILS
        self._schedule = schedule
        self._faults = faults
        self._number = self.dice.below(len(truth.PAIRS), "layouts")
        self.layout = truth.target(self._number)
        self.network = MemoryNetwork()
        self.by_landing: dict[str, Handoff] = {}
        self.damage: dict[str, list[Fault]] = {}
        self.mangled: dict[str, tuple[str, Epoch, bytes]] = {}
        self._claimed: set[str] = set()
        self._proofs: list[tuple[int, int, bytes]] = []
        self._partitions: dict[tuple[str, str, bool], float] = {}
        self._detached: set[asyncio.Task[Any]] = set()
        self._incarnation = 0
        self._graves: list[Worker] = []

    # ---- playing

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()

    async def play(self) -> None:
        """As `machine.Game.play`."""
        self._wrong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.prefills = [self._start(Prefill, f"p{n}") for n in range(WORKERS)]
        self.decodes = [self._start(Decode, f"d{n}") for n in range(WORKERS)]
        self.handoffs = [Handoff(self, number) for number in self._schedule.actors]
        carrying = [self.spawn(self._carry(it)) for it in self.handoffs]
        try:
            everything = asyncio.ensure_future(self._everything(carrying))
            await asyncio.wait((everything, self._wrong), return_when="FIRST_COMPLETED")
            everything.cancel()
            await asyncio.wait((everything,))
        finally:
            for task in self._detached:
                task.cancel()
            for worker in [*self.prefills, *self.decodes, *self._graves]:
                await worker.stop()
            if self._detached:
                await asyncio.wait(self._detached)
        if self._wrong.done():
            self._wrong.result()
        everything.result()
        for handoff in self.handoffs:
            self._check_ending(handoff)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that no process owns: a message under way, or the gateway."""
        task = asyncio.get_running_loop().create_task(work)
        self._detached.add(task)
        task.add_done_callback(self._landed)
        return task

    def later(self, seconds: float, act: Callable[..., Any], *arguments: Any) -> None:
        """Have `act` called in a while."""
        asyncio.get_running_loop().call_later(seconds, act, *arguments)

    def tell(self, line: str) -> None:
        """Add to the story."""
        self.story.append(f"{self.now:7.3f}  {line}")

    def blame(self, what: str) -> None:
        """A promise is broken; the game ends."""
        self.tell(f"BROKEN: {what}")
        if not self._wrong.done():
            self._wrong.set_exception(Violation(what))

    def handoff(self, work: Prefilling) -> Handoff:
        """Whose work it is."""
        link: Any = work.link
        assert isinstance(link, Handoff)
        return link

    def _start(self, kind: Any, name: str) -> Any:
        self._incarnation += 1  # no two processes have the same, as with the time of their start
        return kind(self, name, self._incarnation)

    def _landed(self, task: asyncio.Task[Any]) -> None:
        self._detached.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TransferError | TimeoutError):
            self.blame(f"a task ended with {error!r}")

    async def _everything(self, carrying: list[asyncio.Task[Any]]) -> None:
        """Until all handoffs are over and nobody holds anything."""
        try:
            async with asyncio.timeout(plot.LIMIT_SECONDS):
                await asyncio.gather(*carrying)
                while left := self._left():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            left = [str(it) for it in self.handoffs if not it.over.is_set()] or self._left()
            raise Violation(f"does not end: {', '.join(left)}") from None

    def _left(self) -> list[str]:
        """Who still holds something, or waits for something."""
        workers = [*self.prefills, *self.decodes]
        held = [str(it) for it in workers if it.ledger.free < it.ledger.blocks]
        return held + [f"{it} is not quiet" for it in self.decodes if not it.quiet()]

    # ---- the gateway's part

    async def _carry(self, handoff: Handoff) -> None:
        """Reserve, prefill, and wait until both ends are through."""
        await asyncio.sleep(handoff.latency("start", 0.01))
        if not await self._reserve(handoff):
            handoff.sent = handoff.received = "refused"
            return
        self.strike(handoff, "grant")
        await asyncio.sleep(handoff.latency("prefill", 0.01))
        await self._prefill(handoff)
        await handoff.over.wait()

    async def _reserve(self, handoff: Handoff) -> bool:
        while self.now < plot.DEADLINE_SECONDS:
            worker = self._worker(self.decodes, handoff.decode)
            try:
                handoff.reserved = worker.reserve(handoff)
            except PoolExhausted:
                await asyncio.sleep(0.05)
                continue
            handoff.landing_worker = worker
            self.by_landing[handoff.landing_id] = handoff
            return True
        return False

    async def _prefill(self, handoff: Handoff) -> None:
        assert handoff.reserved is not None
        while handoff.received is None:
            worker = self._worker(self.prefills, handoff.prefill)
            handoff.push_worker = worker
            if worker.begin(handoff, handoff.reserved.landing):
                return
            handoff.disturbed = True  # what waits for memory may outwait its lease
            await asyncio.sleep(0.02)
        handoff.sent_ended("never began")

    def cancel_decode(self, handoff: Handoff) -> None:
        """Tell the decode worker that nobody wants it any more."""
        if handoff.landing_worker is not None:
            handoff.landing_worker.cancel(handoff)

    def cancel_prefill(self, handoff: Handoff) -> None:
        """Tell the prefill worker that nobody wants it any more."""
        if handoff.push_worker is not None:
            handoff.push_worker.cancel(handoff)

    def _worker(self, workers: Any, name: str) -> Any:
        return next(it for it in workers if it.name == name)

    # ---- what strikes

    def strike(self, handoff: Handoff, point: str) -> list[Fault]:
        """`handoff` passes `point`: the world's faults happen, those of its message returned."""
        faults = self._faults.passing(handoff.number, point, handoff.state)
        mine = []
        for fault in faults:
            self.tell(f"{handoff}, {handoff.state()}: {fault.kind} at {point}")
            handoff.disturbed = True
            act = self._world.get(fault.kind)
            if act is None:
                mine.append(fault)
            else:
                act(handoff, fault.amount)
        return mine

    @cached_property
    def _world(self) -> dict[str, Callable[[Handoff, float], None]]:
        return {
            "cancel": self._cancel,
            "stop": self._stop,
            "cut": self._cut,
            "kill sender": self._kill_sender,
            "kill receiver": self._kill_receiver,
            "partition out": partial(self._part, back=False),
            "partition back": partial(self._part, back=True),
        }

    def _cancel(self, handoff: Handoff, amount: float) -> None:
        """The gateway tells both workers, in either order, or dies before it told the second."""
        if amount < 0.75:
            self.later(0.03 * amount, self.cancel_decode, handoff)
        if amount > 0.25:
            self.later(0.03 - 0.03 * amount, self.cancel_prefill, handoff)

    def _stop(self, handoff: Handoff, amount: float) -> None:
        worker = self._worker(self.prefills, handoff.prefill)
        worker.stopped_until = self.now + 2 * plot.LEASE_SECONDS * amount
        self._disturb(prefill=handoff.prefill)

    def _cut(self, handoff: Handoff, amount: float) -> None:
        self._disturb(prefill=handoff.prefill, decode=handoff.decode)
        for writer in self._writers(handoff.prefill, handoff.decode):
            writer.break_off()

    def _part(self, handoff: Handoff, amount: float, *, back: bool) -> None:
        line = (handoff.prefill, handoff.decode, back)
        self._partitions[line] = self.now + LONG_SECONDS * amount
        self._disturb(prefill=handoff.prefill, decode=handoff.decode)

    def held_up(self, handoff: Handoff, *, back: bool = False) -> float:
        """For how many seconds nothing passes that way."""
        line = (handoff.prefill, handoff.decode, back)
        return max(0.0, self._partitions.get(line, 0.0) - self.now)

    def _kill_sender(self, handoff: Handoff, amount: float) -> None:
        worker = self._worker(self.prefills, handoff.prefill)
        self._disturb(prefill=worker.name)
        self._bury(self.prefills, worker, amount)
        for other in self.handoffs:
            if other.push_worker is worker and other.work is not None and other.sent is None:
                other.sent_ended("died")
            other.look()
        for writer in worker.sender.writers:
            writer.break_off()

    def _kill_receiver(self, handoff: Handoff, amount: float) -> None:
        worker = self._worker(self.decodes, handoff.decode)
        self._disturb(decode=worker.name)
        self._bury(self.decodes, worker, amount)
        for other in self.handoffs:
            if other.landing_worker is worker:
                if other.received is None:
                    other.received_ended("died")
                other.finished = True
            other.look()
        for writer in self._writers(None, worker.name):
            seconds = writer.handoff.latency("loss", 0.4)
            self.later(seconds, writer.break_off)

    def _bury(self, workers: list[Any], worker: Worker, amount: float) -> None:
        """It dies, and is started again in its place, as a new incarnation."""
        worker.die()
        self._graves.append(worker)
        workers[workers.index(worker)] = self._start(type(worker), worker.name)

    def _writers(self, prefill: str | None, decode: str) -> list[Any]:
        return [
            writer
            for worker in self.prefills
            for writer in worker.sender.writers
            if prefill in (None, worker.name) and writer.handoff.decode == decode
        ]

    def _disturb(self, prefill: str | None = None, decode: str | None = None) -> None:
        for other in self.handoffs:
            if prefill in (None, other.prefill) and decode in (None, other.decode):
                other.disturbed = True

    # ---- forgeries

    def forged_right(self, handoff: Handoff, kind: str, amount: float) -> tuple[str, Epoch, bytes]:
        """What a damaged `open` shows."""
        assert handoff.reserved is not None
        landing = handoff.reserved.landing
        landing_id, epoch, secret = landing.id, landing.epoch, landing.secret
        if kind == "truncate":
            return landing_id, epoch, secret[: int(amount * len(secret))]
        variant = int(amount * 5)
        if variant == 0:
            secret = bytes([secret[0] ^ 1]) + secret[1:]
        elif variant == 1:
            epoch = Epoch(epoch.incarnation, epoch.counter + 1)
        elif variant == 2:
            epoch = Epoch(epoch.incarnation, epoch.counter - 1)
        elif variant == 3:
            epoch = Epoch(epoch.incarnation - 1, epoch.counter)
        else:
            others = [it for it in self.by_landing if it != landing_id]
            landing_id = self.dice.choose(others or ["?"], "forged", handoff.number)
        return landing_id, epoch, secret

    def tamper_with_proof(
        self, handoff: Handoff, writer: MemoryWriter, faults: dict[str, float]
    ) -> None:
        """Damage the digest of a commit that is about to leave."""
        true: Any = writer._digest
        proof: bytes = true.result()
        if "replay" in faults:
            proof = self._old_proof(handoff)
        if "corrupt" in faults:
            bit = int(faults["corrupt"] * len(proof) * 8)
            damaged = bytearray(proof)
            damaged[bit // 8] ^= 1 << bit % 8
            proof = bytes(damaged)
        if "truncate" in faults:
            proof = proof[: int(faults["truncate"] * len(proof))]
        if proof != true.result():
            handoff.forged = True
            true.result = lambda: proof
        else:
            if any(proof == old for number, _, old in self._proofs if number != handoff.number):
                self.blame(f"{handoff}: its digest is that of another landing")
            self._proofs.append((handoff.number, handoff.prompt, proof))

    def _old_proof(self, handoff: Handoff) -> bytes:
        """The digest of another landing, of the same prompt if there was one."""
        others = [it for it in self._proofs if it[0] != handoff.number]
        like = [it for it in others if it[1] == handoff.prompt]
        return (like or others or [(0, 0, bytes(16))])[-1][2]

    # ---- checks

    @cached_property
    def _block_of_item(self) -> Any:
        """Which block each number of a decode pool belongs to."""
        items = plot.TARGET_BLOCKS * self.layout.block_bytes // self.layout.item_bytes
        blocks = np.zeros(items, dtype=truth.WORDS[self.layout.dtype])
        table = truth.table(blocks, self.layout, plot.TARGET_BLOCKS)
        table[:] = np.arange(plot.TARGET_BLOCKS)[:, None, None, None, None, None]
        return blocks

    def check_claim(self, entry: Expected, epoch: Epoch, secret: bytes) -> None:
        """A right was accepted: it must be the one that was given."""
        landing = entry.landing
        if epoch != landing.epoch:
            self.blame(f"landing {landing.id}: accepted epoch {epoch}, given was {landing.epoch}")
        if secret != landing.secret:
            self.blame(f"landing {landing.id}: accepted a wrong secret")
        if landing.id in self._claimed:
            self.blame(f"landing {landing.id}: a second writer was accepted")
        self._claimed.add(landing.id)

    def check_write(self, worker: Decode, entry: Expected, frame: Frame) -> None:
        """A frame is about to land: its blocks must still be set aside for its landing."""
        handoff = self.by_landing[entry.landing.id]
        if worker.dead or handoff.reserved is None:
            return
        if handoff.received == "admitted":
            self.blame(f"{handoff}: a write landed after it was admitted")
        held = worker.ledger._held
        mine = {
            *held.get(handoff.reserved.holder, ()),
            *held.get(Holder("quarantine", entry.landing.id), ()),
        }
        for block in blocks_of(frame, self._block_of_item, self.layout.item_bytes):
            if block not in mine:
                self.blame(f"{handoff}: a write landed in block {block}, which is not its own")

    def check_arrival(self, worker: Decode, handoff: Handoff, firsts: tuple[First, ...]) -> None:
        """A prefix is admitted: it must be right to the bit, and by its own proof."""
        assert handoff.reserved is not None
        if handoff.forged:
            self.blame(f"{handoff}: admitted on a proof that is not its own")
        if firsts != handoff.firsts:
            self.blame(f"{handoff}: admitted with the first tokens {firsts}")
        self.check_pool(worker, handoff, handoff.reserved.landing.blocks, "when admitted")

    def check_pool(self, worker: Decode, handoff: Handoff, blocks: Any, when: str) -> None:
        """Compare every number of a prefix with what was computed."""
        tokens = truth.tokens_of(handoff.prompt)
        found = worker.table[truth.places(blocks, tokens, self.layout.block_tokens)]
        wrong = np.argwhere(found != truth.words_of(handoff.prompt, self._number))
        if len(wrong):
            self.blame(f"{handoff}: {len(wrong)} numbers differ {when}, the first at {wrong[0]}")

    def check_books(self, worker: Worker) -> None:
        """No block is owned by nobody, or by two that do not share it."""
        if worker.dead:
            return
        wrong = worker.ledger.audit()
        owners: dict[int, Holder] = {}
        for holder, blocks in worker.ledger._held.items():
            if holder.reason != "decode":
                for block in blocks:
                    if owners.setdefault(block, holder) is not holder:
                        wrong.append(f"block {block} has two owners")
        if wrong:
            self.blame(f"{worker}: {'; '.join(wrong)}")

    def _check_ending(self, handoff: Handoff) -> None:
        """It ended once on either side, and well if nothing struck it."""
        ended = f"{handoff}: sent {handoff.sent}, received {handoff.received}"
        if handoff.sent is None or handoff.received is None:
            raise Violation(f"{ended}: it has not ended")
        if handoff.closed > 1:
            raise Violation(f"{handoff}: closed {handoff.closed} times")
        good = (handoff.sent, handoff.received) == ("handed", "admitted")
        if not good and not (
            handoff.disturbed or (handoff.sent == "refused" and self._schedule.faults)
        ):
            raise Violation(f"{ended}, although nothing struck it")
