"""Both ends of handoffs: the production code, and as little around it as it needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.api import BackendInfo
from backends.errors import PoolExhausted
from backends.host.config import HostConfig
from backends.host.handoff import Pushes, decode_note
from backends.host.janitor import Janitor
from backends.host.landings import Landings
from backends.host.ledger import Holder, Ledger
from backends.host.reserved import Reserved
from backends.host.reuse import Reuse
from backends.host.sharing import share_out
from backends.host.work import Held, Prefilling, Running, deadline_of, sequences_of
from tests.chaos.handoffs import truth
from tests.chaos.handoffs.plot import (
    CAP_BLOCKS,
    COMMIT_SECONDS,
    LEASE_SECONDS,
    SOURCE_BLOCKS,
    TARGET_BLOCKS,
)
from tests.chaos.handoffs.wire import ChaoticSender, chaotic
from transfer.contract import Arrival, KVSlice
from transfer.layout import KVLayout, Landing

if TYPE_CHECKING:
    from tests.chaos.handoffs.game import Game
    from tests.chaos.handoffs.handoff import Handoff


def info_of(layout: KVLayout, blocks: int) -> BackendInfo:
    """A backend that nobody asks to compute."""
    return BackendInfo(
        layout=layout,
        pool_blocks=blocks,
        vocabulary=100,
        context_tokens=100,
        end_tokens=(),
        rng="positional",
        continuation="exact",
        sampling=frozenset(),
    )


def held_by(handoff: Handoff) -> Held:
    """What a handoff holds; it stands where the connection of a gateway would."""
    link: Any = handoff
    return Held(link, handoff.spec.handle, f"{handoff.spec.request}#{handoff.spec.handle}")


class Worker:
    """A process: all of it dies at once, and nothing that it began goes on."""

    def __init__(self, game: Game, name: str, incarnation: int, layout: KVLayout, blocks: int):
        self.game = game
        self.name = name
        self.incarnation = incarnation
        self.dead = False
        self.config = HostConfig(
            id=name,
            role="both",
            listen="",
            lease_seconds=LEASE_SECONDS,
            commit_timeout_seconds=COMMIT_SECONDS,
            landing_share=1.0,
            quarantine_share=CAP_BLOCKS / TARGET_BLOCKS,
        )
        self.info = info_of(layout, blocks)
        self.ledger: Ledger = game.parts.ledger(blocks)
        self.janitor: Janitor = game.parts.janitor()
        self.pool = np.full(blocks * layout.block_bytes, 0x5A, dtype=np.uint8)
        self.table = truth.table(self.pool, layout, blocks)
        self._tasks: set[asyncio.Task[None]] = set()
        self.spawn(self.janitor.run())

    def __str__(self) -> str:
        return f"{self.name}.{self.incarnation}"

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that dies with the process; an error in it is a finding."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def die(self) -> None:
        """SIGKILL."""
        self.dead = True
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """End what runs for ever."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.game.blame(f"{self}: a task ended with {task.exception()!r}")


class Prefill(Worker):
    """The sending end."""

    def __init__(self, game: Game, name: str, incarnation: int) -> None:
        super().__init__(game, name, incarnation, truth.SOURCE, SOURCE_BLOCKS)
        self.stopped_until = 0.0
        self.stalled = False
        self.unacknowledged: list[Callable[[], None]] = []
        self.sender = ChaoticSender(game, self)
        self.pushes: Pushes = game.parts.pushes(
            self.sender,
            self.pool,
            self.info,
            self.janitor,
            self.spawn,
            commit_seconds=COMMIT_SECONDS,
            failed=self._failed,
            closed=self._closed,
        )
        self._computing: dict[Prefilling, asyncio.Task[None]] = {}

    def die(self) -> None:
        super().die()
        for release in self.unacknowledged:
            release()

    def begin(self, handoff: Handoff, landing: Landing) -> bool:
        """Compute and push the prefix; False when there is no room for it here."""
        spec = handoff.spec
        held = held_by(handoff)
        work = Prefilling(
            held=held,
            spec=spec,
            prefix=spec.prefix,
            holder=Holder("prefill", held.name),
            headroom=Holder("headroom", held.name),
            decode_here=False,
            arrived=0.0,
            deadline=deadline_of(spec),
            sequences=sequences_of(spec),
        )
        try:
            work.blocks = self.ledger.take(truth.SOURCE.blocks_for(len(work.prefix)), work.holder)
        except PoolExhausted:
            return False
        work.push = self.pushes.prepare(work, landing)
        handoff.work = work
        work.busy = True
        task = self.spawn(self._compute(handoff, work))
        self._computing[work] = task
        task.add_done_callback(lambda _: self._computed(work))
        return True

    def cancel(self, handoff: Handoff) -> None:
        """The gateway wants no more of it."""
        work = handoff.work
        if work is not None and not work.ended and not self.dead:
            handoff.sent_ended("cancelled")
            self._drop(work)

    async def _compute(self, handoff: Handoff, work: Prefilling) -> None:
        """Write the true KV, layer by layer and chunk by chunk, as a backend would."""
        kv = truth.kv_of(handoff.prompt)
        tokens = len(work.prefix)
        where, within = truth.places(work.blocks, tokens, truth.SOURCE.block_tokens)
        borders = [0, handoff.chunk, tokens] if 0 < handoff.chunk < tokens else [0, tokens]
        number = 0
        for start, end in pairwise(borders):
            for layer in range(truth.SOURCE.layers):
                self.game.strike(handoff, "compute")
                await asyncio.sleep(handoff.pace(number))
                while self.stopped_until > self.game.now:
                    await asyncio.sleep(self.stopped_until - self.game.now)
                bits = kv[start:end, layer].view(np.uint32)
                self.table[where[start:end], within[start:end], layer] = bits
                self.pushes.ready(work, KVSlice(layer, start, end))
                number += 1
        assert work.push is not None
        work.push.finish(handoff.firsts)

    def _computed(self, work: Prefilling) -> None:
        del self._computing[work]
        work.busy = False
        self._release(work)

    def _failed(self, work: Prefilling, code: str, detail: str) -> None:
        if not self.dead:
            self.game.handoff(work).sent_ended(f"failed: {code}")
            self._drop(work)

    def _closed(self, work: Prefilling) -> None:
        if not self.dead:
            self.game.handoff(work).closed += 1
            self._drop(work)
            self._release(work)

    def _drop(self, work: Prefilling) -> None:
        work.ended = True
        if work in self._computing:
            self._computing[work].cancel()
        self.pushes.cancel(work)
        self._release(work)

    def _release(self, work: Prefilling) -> None:
        if work.ended and not work.busy and work not in self.pushes and not self.dead:
            if self.ledger.release(work.holder):
                self.table[work.blocks] = 0x7FC07FC0  # the engine's next work, at once
            self.game.checks.books(self)
            self.game.handoff(work).look()


class Decode(Worker):
    """The receiving end."""

    def __init__(self, game: Game, name: str, incarnation: int) -> None:
        super().__init__(game, name, incarnation, game.layout, TARGET_BLOCKS)
        self.receivers = [chaotic(game, self, rail) for rail in range(game.rails)]
        wanted = "on" if game.reuses else "off"
        self.reuse: Reuse = game.parts.reuse(
            wanted, self.info, self.pool, self.ledger, lambda: None
        )
        self.landings: Landings = game.parts.landings(
            self.config,
            self.info,
            self.pool,
            self.ledger,
            self.reuse,
            self.janitor,
            incarnation,
            admit=self._admit,
            failed=self._failed,
            freed=lambda: game.checks.books(self),
            shunned=self._shunned,
        )
        self.landings.receivers = [*self.receivers]
        self.spawn(self.landings.reap())
        self._running: dict[int, tuple[list[Running], asyncio.TimerHandle]] = {}

    def reserve(self, handoff: Handoff) -> Reserved:
        """As `Landings.reserve`."""
        reserved = self.landings.reserve(
            held_by(handoff), handoff.spec, prefill=handoff.prefill, partial=True
        )
        for entry in reserved.kept:
            self.game.tell(f"{handoff}: finds block {entry.block}")
        self.game.checks.books(self)
        return reserved

    def cancel(self, handoff: Handoff) -> None:
        """The gateway wants no more of it, in whatever state it is."""
        if self.dead or handoff.reserved is None:
            return
        if handoff.received is None:
            handoff.received_ended("cancelled")
            self.landings.withdraw(handoff.reserved.landing.id)
        self._finish(handoff)

    def quiet(self) -> bool:
        """Whether nothing is held, awaited or remembered any more."""
        books = [len(receiver.landings) for receiver in self.receivers]
        return not (self.janitor.errands or len(self.landings) or any(books))

    def die(self) -> None:
        super().die()
        for _, timer in self._running.values():
            timer.cancel()
        for receiver in self.receivers:
            receiver.crash()

    def _admit(self, reserved: Reserved, arrival: Arrival) -> None:
        """What `Requests` does with an arrival, and the look at the pool that it cannot take."""
        handoff: Any = reserved.held.link
        firsts = decode_note(arrival.note)
        handoff.received_ended("admitted")
        self.game.checks.arrival(self, handoff, firsts)
        self.ledger.release(reserved.headroom)
        started, copies = share_out(
            self.ledger,
            self.info.layout.block_tokens,
            reserved.held,
            reserved.spec,
            firsts,
            list(reserved.landing.blocks),
            max_tokens=8,
            deadline=reserved.deadline,
        )
        self.reuse.keep(reserved.links, reserved.landing.blocks, arrival.proofs)
        self.ledger.release(reserved.holder)
        self.ledger.release(reserved.reused)
        for source, copy in copies:
            self.table[copy] = self.table[source]
        loop = asyncio.get_running_loop()
        timer = loop.call_later(handoff.decode_seconds, self._finish, handoff)
        self._running[handoff.number] = (started, timer)
        self.game.checks.books(self)
        loop.call_later(handoff.decode_seconds / 2, self.game.strike, handoff, "decode")

    def _shunned(self) -> None:
        self.game.tell(f"{self}: shuns {', '.join(self.landings.shunned) or 'nobody any more'}")

    def _failed(self, reserved: Reserved, code: str, detail: str) -> None:
        handoff: Any = reserved.held.link
        handoff.received_ended(f"failed: {code}")
        self.game.checks.kept(handoff, code)
        self.game.checks.books(self)

    def _finish(self, handoff: Handoff) -> None:
        started, timer = self._running.pop(handoff.number, ([], None))
        if timer is None:
            return
        timer.cancel()
        for running in started:
            self.game.checks.pool(self, handoff, running.blocks, "at its last token")
            self.ledger.release(running.holder)
        self.game.checks.books(self)
        handoff.finished = True
        handoff.look()
