"""One prefix on its way between two workers, as whoever plays the schedule sees it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from backends.api import Sampling
from backends.host.ledger import Holder
from backends.host.reserved import Reserved
from backends.host.work import Prefilling
from backends.protocol import First, HandedOver, RequestSpec, SequenceSpec
from tests.chaos.handoffs import plot, truth
from tests.chaos.handoffs.workers import Decode, Prefill

if TYPE_CHECKING:
    from tests.chaos.handoffs.game import Game


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
        self.prefill = game.prefills[dice.below(len(game.prefills), "from", number)].name
        self.decode = game.decodes[dice.below(len(game.decodes), "to", number)].name
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
        self.outrun = False
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
            salt=b"tenant",
        )

    # ---- what it is like now

    @property
    def landing_id(self) -> str:
        """The id of its landing, once it has one."""
        return self.reserved.landing.id if self.reserved is not None else ""

    @property
    def quarantine(self) -> Holder:
        """For whom the ledger holds its blocks once it has ended badly."""
        return Holder("quarantine", f"{self.landing_id} from {self.prefill}")

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
        return "quarantined" if self.quarantine in worker.ledger._held else "freed"

    def latency(self, purpose: str, seconds: float = 0.004) -> float:
        """A short time, never twice the same; longer on the way to a worker that is far away."""
        self._latencies[purpose] += 1
        seconds *= 12 if self.far and purpose in plot.LONG_WAYS else 1
        return seconds * self.game.dice("latency", self.number, purpose, self._latencies[purpose])

    def pace(self, number: int) -> float:
        """How long the `number`-th slice is computed; of a slow one, most of a lease."""
        share = self.game.dice("pace", self.number, number)
        return plot.LEASE_SECONDS * (0.3 + 0.25 * share) if self.slow else 0.03 * share

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
