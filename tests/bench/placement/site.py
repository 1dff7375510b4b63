"""A gateway, its queue and its workers in virtual time, under one policy and one load."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from math import inf

from backends.protocol import Sampling
from gateway.life.placing import OVERTAKEN_SECONDS
from gateway.placement import Booking, Books, Placement, Snapshot, Wish, least_seconds, place
from tests.bench.placement.fleet import Fleet
from tests.bench.placement.hardware import STEP_TOKENS, STEPS_AHEAD, Machine, Prompt, info
from tests.bench.placement.orders import GAP_SECONDS, Request
from tests.bench.placement.policies import Policy
from tests.bench.placement.shapes import Shape, arrivals

LOAD_SECONDS = 1.0
WARM_UP = 0.1


class Site:
    """One run. `expected` is what the operator believes of the length of an answer."""

    def __init__(
        self, fleet: Fleet, shape: Shape, policy: Policy, rate: float, requests: int, seed: int
    ) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._policy = policy
        self._queue = policy.queue()
        self._wire = fleet.wire
        rng = random.Random(f"noise {seed}")
        self._machines = {
            name: Machine(name, role, device, rng, lambda: self.now, self.at)
            for name, role, device in fleet.workers
        }
        self._info = {name: info(device, 1 << 20) for name, _, device in fleet.workers}
        self._pairs = frozenset(
            (one.id, other.id)
            for one in self._machines.values()
            for other in self._machines.values()
            if one is not other and one.role != "decode" and other.role != "prefill"
        )
        self._books = Books(self._freed)
        self._expected = round(shape.means()[1])
        self._offered = sum(
            STEPS_AHEAD * STEP_TOKENS for it in self._machines.values() if it.role != "decode"
        )
        self._decode_offered = sum(
            it.device.pool_tokens for it in self._machines.values() if it.role != "prefill"
        )
        self._prefilling = self._decoding = self._queued_tokens = 0
        self._waiting_for_room: list[tuple[float, Request]] = []
        self._pumping = self._will_pump = False
        self.requests = list(self._draw(seed, shape, rate, requests))

    def _draw(self, seed: int, shape: Shape, rate: float, requests: int) -> Iterator[Request]:
        rng, whose = random.Random(f"lengths {seed}"), random.Random(f"tenants {seed}")
        for number, at in zip(range(requests), arrivals(seed, rate, shape.burst), strict=False):
            prompt, answer = shape.lengths(rng)
            tenant = f"tenant-{whose.randrange(self._policy.tenants)}"
            yield Request(number, tenant, at, prompt, answer)

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Run `act` after so many seconds."""
        heappush(self._events, (self.now + seconds, next(self._order), act))

    def run(self) -> list[Request]:
        """Play it to the end; the requests after the warm-up."""
        for request in self.requests:
            self.at(request.arrived, lambda it=request: self._arrive(it))
        last = self.requests[-1].arrived
        self._report(last)
        while self._events:
            self.now, _, act = heappop(self._events)
            act()
        return self.requests[int(len(self.requests) * WARM_UP) :]

    def _report(self, until: float) -> None:
        """Every worker says once a second how full it is."""
        for it in self._machines.values():
            free = self._info[it.id].pool_blocks - it.used_blocks
            self._books.told(
                it.id, waiting_tokens=it.waiting_tokens, running=it.running, free_blocks=free
            )
            steps, since = it.told
            if it.steps - steps >= 8:
                self._books.stepped(
                    it.id, it.device.max_batch, (self.now - since) / (it.steps - steps)
                )
                it.told = it.steps, self.now
        self._pump()
        if self.now < until:
            self.at(LOAD_SECONDS, lambda: self._report(until))

    # ---- the queue

    def _arrive(self, request: Request) -> None:
        backlog = self._queued_tokens + sum(it.waiting_tokens for it in self._machines.values())
        prefills = sum(it.role != "decode" for it in self._machines.values())
        if backlog / prefills > self._policy.most_tokens:
            request.refused = "busy"
            return
        if self._policy.targets:
            request.needs = least_seconds(self._snapshot(), self._wish(request))
        self._queued_tokens += request.prompt
        self._queue.push(request, self._expected)
        self._pump()

    def _pump(self) -> None:
        """Place those that wait for room, then grant, strictly in order, while there is room."""
        self._will_pump = False
        if self._pumping:
            return
        self._pumping = True
        self._try_again()
        while (request := self._queue.head()) is not None:
            if self.now > request.due - request.needs:
                self._queue.pop()
                self._queued_tokens -= request.prompt
                request.refused = "overdue"
            elif self._fits(request):
                self._queue.pop()
                self._queued_tokens -= request.prompt
                self._prefilling += self._claim(request)
                self._decoding += request.prompt + self._expected
                if self._held_up() or not self._place(request):
                    self._waiting_for_room.append((self.now, request))
            else:
                break
        self._pumping = False

    def _try_again(self) -> None:
        """As `gateway.life.placing` has it: in order, smaller ones before those that cannot yet."""
        waiting, self._waiting_for_room = self._waiting_for_room, []
        for since, request in waiting:
            if self._held_up() or not self._place(request):
                self._waiting_for_room.append((since, request))

    def _held_up(self) -> bool:
        return not self._policy.targets and any(
            self.now - since > OVERTAKEN_SECONDS for since, _ in self._waiting_for_room
        )

    def _fits(self, request: Request) -> bool:
        prefill = self._prefilling + self._claim(request) <= self._offered
        wanted = request.prompt + self._expected
        return prefill and (self._decoding + wanted <= self._decode_offered or not self._decoding)

    def _claim(self, request: Request) -> int:
        """A prompt is computed by one worker: it claims no more than one worker offers."""
        return min(request.prompt, STEPS_AHEAD * STEP_TOKENS)

    def _freed(self) -> None:
        if not self._will_pump:
            self._will_pump = True
            self.at(0.0, self._pump)

    # ---- one request's life

    def _snapshot(self) -> Snapshot:
        views = (
            self._books.view(it.id, it.role, self._info[it.id], self.now, step_tokens=STEP_TOKENS)
            for it in self._machines.values()
        )
        return self._books.snapshot(views, self._pairs)

    def _wish(self, request: Request) -> Wish:
        targets = self._policy.targets
        return Wish(
            tokens=request.prompt,
            sequences=1,
            sampling=Sampling(),
            expected=self._expected,
            first_token_seconds=request.due - self.now if targets else inf,
            gap_seconds=GAP_SECONDS if targets else inf,
            decodes=request.answer > 1,
        )

    def _place(self, request: Request) -> bool:
        """False when there is no room now."""
        wish = self._wish(request)
        chosen = place(self._snapshot(), wish)
        if not isinstance(chosen, Placement):
            if chosen.kind == "full" and self.now <= request.due:
                return False
            request.refused = chosen.kind
            self._prefilling -= self._claim(request)
            self._decoding -= request.prompt + self._expected
            self._freed()
            return True
        booking = self._books.place(chosen, wish, 16, self.now)
        holder = self._machines[booking.holder]
        blocks = -(-(request.prompt + request.answer) // 16)
        holder.used_blocks += blocks
        self._machines[chosen.prefill].prefill(
            Prompt(request.prompt, lambda took: self._first(request, booking, blocks, took))
        )
        return True

    def _first(self, request: Request, booking: Booking, blocks: int, took: float) -> None:
        request.first = self.now
        booking.prefilled(took, self.now)
        self._prefilling -= self._claim(request)
        if request.answer == 1:
            self._end(request, booking, blocks)
        elif booking.decode is None:
            self._decode(request, booking, blocks)
        else:
            layout = self._info[booking.decode].layout
            size = request.prompt * layout.block_bytes // layout.block_tokens
            seconds = self._wire.seconds(size)
            self.at(seconds, lambda: self._land(request, booking, blocks, size, seconds))
        self._pump()

    def _land(
        self, request: Request, booking: Booking, blocks: int, size: int, seconds: float
    ) -> None:
        booking.handed_over(size, seconds)
        booking.landed()
        self._decode(request, booking, blocks)

    def _decode(self, request: Request, booking: Booking, blocks: int) -> None:
        self._machines[booking.holder].decode(
            request.prompt, request.answer - 1, lambda: self._end(request, booking, blocks)
        )

    def _end(self, request: Request, booking: Booking, blocks: int) -> None:
        request.ended = self.now
        self._machines[booking.holder].used_blocks -= blocks
        self._decoding -= request.prompt + self._expected
        booking.end(self.now)
