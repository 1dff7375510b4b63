"""One schedule of handoffs being played: the world's faults and the gateway's part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import cached_property, partial
from typing import Any

import msgspec

from backends.errors import PoolExhausted
from backends.host.handoff import Pushes
from backends.host.janitor import Janitor
from backends.host.landings import Landings as HostLandings
from backends.host.ledger import Ledger
from backends.host.reuse import Reuse
from backends.host.work import Prefilling
from tests.chaos.clock import play
from tests.chaos.handoffs import plot, truth
from tests.chaos.handoffs.checks import Checks
from tests.chaos.handoffs.forgeries import Forger
from tests.chaos.handoffs.handoff import Handoff
from tests.chaos.handoffs.rival import Rival
from tests.chaos.handoffs.wire import LONG_SECONDS
from tests.chaos.handoffs.workers import Decode, Prefill, Worker
from tests.chaos.machine import Faults, Plotted, Violation
from tests.chaos.schedule import Fault, Schedule
from transfer.errors import TransferError
from transfer.landings import Landings
from transfer.layout import Epoch, Landing
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender

WORKERS = 2  # of either kind


class Parts(msgspec.Struct, frozen=True):
    """The code under test; a mutant has one part exchanged."""

    ledger: type[Ledger] = Ledger
    reuse: type[Reuse] = Reuse
    landings: type[HostLandings] = HostLandings
    janitor: type[Janitor] = Janitor
    pushes: type[Pushes] = Pushes
    receiver: type[MemoryReceiver] = MemoryReceiver
    sender: type[MemorySender] = MemorySender
    book: type[Landings] = Landings


class Handoffs(Plotted):
    """The scenario: at least eight handoffs at a time, between two workers of either kind."""

    name = "handoffs"
    plot = plot

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts or Parts()

    def game(self, schedule: Schedule, faults: Faults) -> Game:
        """As `Scenario.game`."""
        return Game(self.parts, schedule, faults)


class Game:
    """All of one schedule."""

    def __init__(self, parts: Parts, schedule: Schedule, faults: Faults) -> None:
        self.parts = parts
        self.dice = faults.dice
        self.story: list[str] = []
        self.rails = plot.RAILS
        self._schedule = schedule
        self._faults = faults
        self.number = self.dice.below(len(truth.PAIRS), "layouts")
        self.layout = truth.target(self.number)
        self.reuses = self.dice("reuses") < 0.5
        self.network = MemoryNetwork()
        self.checks = Checks(self)
        self.forger = Forger(self)
        self.by_landing: dict[str, Handoff] = {}
        self.damage: dict[str, list[Fault]] = {}
        self.rivals: dict[object, Prefill] = {}
        self.mangled: dict[str, tuple[str, Epoch, bytes]] = {}
        self._partitions: dict[tuple[str, str, bool], float] = {}
        self._detached: set[asyncio.Task[Any]] = set()
        self._incarnation = 0
        self._graves: list[Worker] = []

    # ---- playing

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()

    def play(self) -> None:
        """As `machine.Game.play`."""
        play(self._play())

    async def _play(self) -> None:
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
            self.checks.ending(handoff, bool(self._schedule.faults))

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
        link: Any = work.held.link
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

    def rival(self, handoff: Handoff, landing: Landing) -> None:
        """Another worker begins the same handoff."""
        worker = next(it for it in self.prefills if it.name != handoff.prefill)
        rival = Rival(self, worker, handoff, landing)
        worker.sender.writers.append(rival)
        self.spawn(rival.run())

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
        faults = self._faults.passing(
            handoff.number, point, lambda: "outrun" if handoff.outrun else handoff.state()
        )
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
            "stall": self._stall,
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

    def _stall(self, handoff: Handoff, amount: float) -> None:
        """For good: after a while somebody kills it."""
        worker = self._worker(self.prefills, handoff.prefill)
        worker.stalled = True
        self._disturb(prefill=worker.name)
        self.later(1 + 2 * amount, self._kill, worker)

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
        self._kill(self._worker(self.prefills, handoff.prefill))

    def _kill(self, worker: Prefill) -> None:
        if worker.dead:
            return
        self._disturb(prefill=worker.name)
        self._bury(self.prefills, worker)
        for other in self.handoffs:
            if other.push_worker is worker and other.work is not None and other.sent is None:
                other.sent_ended("died")
            other.look()
        for writer in worker.sender.writers:
            writer.break_off()

    def _kill_receiver(self, handoff: Handoff, amount: float) -> None:
        worker = self._worker(self.decodes, handoff.decode)
        self._disturb(decode=worker.name)
        self._bury(self.decodes, worker)
        for other in self.handoffs:
            if other.landing_worker is worker:
                if other.received is None:
                    other.received_ended("died")
                other.finished = True
            other.look()
        for writer in self._writers(None, worker.name):
            seconds = writer.handoff.latency("loss", 0.4)
            self.later(seconds, writer.break_off)

    def _bury(self, workers: list[Any], worker: Worker) -> None:
        """It dies, and is started again in its place, as a new incarnation."""
        self.tell(f"{worker} dies")
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
