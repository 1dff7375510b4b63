"""One schedule of the whole control plane being played."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from backends.protocol import LENGTH
from tests.chaos.control import plot
from tests.chaos.control.checks import Checks
from tests.chaos.control.client import Client, client_of
from tests.chaos.control.network import End, Network, Treatment
from tests.chaos.control.processes import (
    CONTROL_PORT,
    DATA_PORT,
    FRONT_PORT,
    GatewayProcess,
    Process,
    RedisProcess,
    WorkerProcess,
)
from tests.chaos.control.strikes import Strikes, damaged
from tests.chaos.control.world import ProcessLoop, World
from tests.chaos.machine import Faults, Plotted, Violation
from tests.chaos.schedule import Fault, Schedule

QUIET_POLL_SECONDS = 0.1


class Parts(msgspec.Struct, frozen=True):
    """What is not as in production: `lua` is a text in the scripts, and what replaces it."""

    lua: tuple[str, str] | None = None


class Control(Plotted):
    """The scenario: at least eight requests at a time."""

    name = "control"
    plot = plot

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts or Parts()

    def game(self, schedule: Schedule, faults: Faults) -> Game:
        """As `Scenario.game`."""
        return Game(self.parts, schedule, faults)


class Spec(msgspec.Struct):
    """What a message's request is called."""

    request: str = ""
    handle: int = 0


class Row(msgspec.Struct, array_like=True):
    """The beginning of a token's row."""

    handle: int = 0


class Peek(msgspec.Struct):
    """As much of a control message as the game must know."""

    type: str
    handle: int = 0
    spec: Spec | None = None
    prefill: Any = None
    rows: tuple[Row, ...] = ()
    landing: dict[str, Any] | None = None


_peek = msgspec.msgpack.Decoder(Peek)


class Game:
    """All of one schedule."""

    def __init__(self, parts: Parts, schedule: Schedule, faults: Faults) -> None:
        self.parts = parts
        self.dice = faults.dice
        self.random = random.Random(schedule.seed)
        self.story: list[str] = []
        self.world = World()
        self.network = Network(self.world, schedule.seed)
        self.network.watch = self._watch
        self.checks = Checks(self)
        self.landings: dict[str, int] = {}
        self.struck: list[Fault] = []
        self._schedule = schedule
        self._faults = faults
        self._strikes = Strikes(self)
        self._violation: str | None = None
        self._handles: dict[tuple[str, int], int] = {}
        self._starts = 0
        self.calm = 0.0
        self._calms: list[tuple[float, float]] = []
        self.all: list[Process] = []
        self.processes: dict[str, Any] = {}
        self.outside = ProcessLoop(self.world, "outside")
        self.outside.sockets = self.network
        self.clients = {number: Client(self, number) for number in schedule.actors}

    # ---- playing

    @property
    def gateways(self) -> list[GatewayProcess]:
        """Those that are there."""
        return [it for slot in plot.GATEWAYS if (it := self.processes.get(slot)) is not None]

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that are there."""
        slots = (*plot.PREFILLS, *plot.DECODES)
        return [it for slot in slots if (it := self.processes.get(slot)) is not None]

    def play(self) -> None:
        """As `machine.Game.play`."""
        outer, monotonic = asyncio.events._get_running_loop(), time.monotonic
        random.seed(self._schedule.seed)
        time.monotonic = lambda: self.world.now  # durations that processes measure and report
        try:
            self._begin()
            self.world.run()
        finally:
            left = self._dispose()
            time.monotonic = monotonic
            asyncio.events._set_running_loop(outer)
        if self._violation is not None:
            raise Violation(self._violation)
        if left:
            raise Violation("; ".join(left))
        for client in self.clients.values():
            self._judge(client)

    def _begin(self) -> None:
        for slot in (plot.REDIS, *plot.PREFILLS, *plot.DECODES, *plot.GATEWAYS):
            self.start(slot)
        self.outside.create_task(self._everything())

    def start(self, slot: str, kept: Any = None) -> None:
        """A process begins, with what an earlier one has left on disk."""
        self._starts += 1
        if slot == plot.REDIS:
            process: Any = RedisProcess(self, slot, kept)
        elif slot in plot.GATEWAYS:
            process = GatewayProcess(self, slot, self._starts)
        else:
            process = WorkerProcess(self, slot, self._starts)
        self.processes[slot] = process
        self.all.append(process)

    async def _everything(self) -> None:
        try:
            async with asyncio.timeout(plot.LIMIT_SECONDS):
                while not self._staffed():
                    await asyncio.sleep(0.02)
                async with asyncio.TaskGroup() as tasks:
                    for client in self.clients.values():
                        tasks.create_task(self._send(client))
                while any(it.ending is None for it in self.clients.values()):
                    await asyncio.sleep(QUIET_POLL_SECONDS)
        except TimeoutError:
            waiting = [str(it) for it in self.clients.values() if it.ending is None]
            self.blame(f"does not end: {', '.join(waiting)}")
        await self._quiet()
        self.world.over = True

    async def _quiet(self) -> None:
        """Nothing may be left soon after the last client's end, or the last thing that struck."""
        ended = self.world.now
        while left := self._left():
            patience = plot.QUIET_SECONDS if self.struck else plot.SERVING_SECONDS
            if self.world.now > max(ended, self.calm) + patience:
                self.blame(f"after {patience:.0f} s: {', '.join(left)}")
                return
            await asyncio.sleep(QUIET_POLL_SECONDS)
        self._look()

    async def _send(self, client: Client) -> None:
        await asyncio.sleep(client.arrives)
        if client.ending is None:
            await client.ask()

    def _staffed(self) -> bool:
        pairs = len(plot.PREFILLS) * len(plot.DECODES)
        return all(len(it.fleet.snapshot().pairs) == pairs for it in self.gateways)

    def _left(self) -> list[str]:
        """Who still holds something, or owes something."""
        slots = {plot.REDIS, *plot.PREFILLS, *plot.DECODES, *plot.GATEWAYS}
        left = [f"{slot} is down" for slot in slots - self.processes.keys()]
        left += [str(it) for it in self.processes.values() if it.loop.stopped]
        left += [it.left for it in self.workers if it.left]
        left += [f"{it} is not idle" for it in self.gateways if not it.idle]
        redis = self.processes.get(plot.REDIS)
        if redis is not None:
            redis.server._tell_time()
            left += self.checks.queue(redis.server)
        return left

    def _look(self) -> None:
        self.checks.lifetimes(self.processes[plot.REDIS].server)
        for worker in self.workers:
            self.checks.books(worker)

    def _dispose(self) -> list[str]:
        self.world.over = True
        left = []
        for process in [*self.all, None]:
            loop = process.loop if process is not None else self.outside
            dead = loop.dead
            stays = loop.dispose()
            if not dead:
                left += [f"{loop.name}: {it} does not end when it is cancelled" for it in stays]
        return left

    def _judge(self, client: Client) -> None:
        if client.ending is None:
            raise Violation(f"{client} has not ended")
        if client.ending == "done" or (client.hurried and client.ending in plot.LATE):
            return
        if not self.struck:
            raise Violation(f"{client} ended as {client.ending}, although nothing struck")
        if client.ending == "DeadlineExceeded" and not self._had_calm(client):
            return
        kinds = [fault.kind for fault in self.struck]
        causes = [it for it in kinds if it in plot.CAUSES[client.ending]]
        weight = sum(plot.WEIGHT.get(it, 1) for it in causes)
        if weight < plot.LEAST.get(client.ending, 1):
            raise Violation(f"{client} ended as {client.ending}, for no more than {causes}")

    def _had_calm(self, client: Client) -> bool:
        """Whether nothing struck for so long that whoever waited then ought to have been served."""
        assert client.ended_at is not None
        began, ended = client.ended_at - client.seconds, client.ended_at
        stretches = [*self._calms, (self.calm, ended)]
        lengths = [min(ended, until) - max(began, since) for since, until in stretches]
        return max(lengths) >= plot.QUIET_SECONDS

    def disturb(self, until: float) -> None:
        """Something strikes, and is over by then."""
        if self.calm < self.world.now:
            self._calms.append((self.calm, self.world.now))
        self.calm = max(self.calm, until)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """A task of the world outside."""
        self.outside.create_task(work)

    def tell(self, line: str) -> None:
        """Add to the story."""
        self.story.append(f"{self.world.now:7.3f}  {line}")

    def blame(self, what: str) -> None:
        """A promise is broken; the game ends. What happens as it is taken down is nothing."""
        if not self.world.over:
            self.tell(f"BROKEN: {what}")
            self._violation = what
            self.world.over = True

    # ---- messages

    def _watch(self, end: End, data: Any) -> Treatment | None:
        _, _, port = end.address.partition(":")
        if port == str(CONTROL_PORT) and end.address[0] != "r":
            return self._control(end, data)
        if port == str(DATA_PORT):
            return self._data(data)
        if port == str(FRONT_PORT):
            return self._front(end, data)
        return self._redis(data)

    def _control(self, end: End, data: bytes) -> Treatment | None:
        message = _peek.decode(data[LENGTH.size :])
        gateway = end.loop.name if end.loop.name[0] == "g" else end.peer.loop.name
        spec = message.spec
        if spec is not None:
            number = client_of(spec.request)
            self._handles[gateway, spec.handle] = number
            client = self.clients[number]
            if message.type == "Reserve":
                client.decode, client.prefill = end.address[:2], message.prefill
                self.checks.placed(gateway, client.prefill, client.decode)
            else:
                client.prefill = end.address[:2]
            return self._treat(number, message.type, data)
        handles = [row.handle for row in message.rows] or [message.handle]
        told = None
        for handle in dict.fromkeys(handles):
            known = self._handles.get((gateway, handle))
            if known is None:
                continue
            if message.type == "Granted" and message.landing is not None:
                self.landings[message.landing["id"]] = known
            told = self._treat(known, message.type, data) or told
        return told

    def _data(self, data: Any) -> Treatment | None:
        number = self.landings.get(data[1])
        return None if number is None else self._treat(number, data[0], data)

    def _front(self, end: End, data: Any) -> Treatment | None:
        if data[0] == "post":
            return self._treat(data[1], "post", data)
        attempt = end.peer.protocol
        return self._treat(attempt.client.number, data[0], data) if attempt is not None else None

    def _redis(self, data: Any) -> Treatment | None:
        if not (isinstance(data, list) and isinstance(data[0], dict)):
            return None
        channel = data[0]["channel"]
        if data[0]["type"] != "message" or not channel.startswith(b"baton:{chaos}:grants:"):
            return None
        told = None
        for name in msgspec.msgpack.decode(data[0]["data"])[::2]:
            number = self.checks.turn(name)
            if number is not None:
                told = self._treat(number, "grant", data) or told
        return told

    def _treat(self, number: int, point: str, data: Any) -> Treatment | None:
        if point not in plot.MENU:
            return None
        told = None
        for fault in self.strike(number, point):
            told = told or Treatment(data)
            if fault.kind == "delay":
                told.later = fault.amount * plot.LONG_SECONDS
                # After what holds it up.
                self.disturb(max(self.calm, self.world.now) + told.later)
            elif fault.kind == "again":
                told.again = True
            elif fault.kind == "drop":
                told.data = []
            elif fault.kind == "stale":
                what, landing, epoch, secret = data
                told.data = (
                    what,
                    landing,
                    type(epoch)(epoch.incarnation, epoch.counter - 1),
                    secret,
                )
            elif fault.kind == "corrupt":
                told.data = damaged(data, fault.amount)
        return told

    # ---- what strikes

    def strike(self, number: int, point: str) -> list[Fault]:
        """A request passes `point`: the world's faults happen, its message's are returned."""
        client = self.clients.get(number)
        if client is None or self.world.over:
            return []
        mine = []
        for fault in self._faults.passing(number, point, lambda: self.state(client, point)):
            self.tell(f"{client}, {self.state(client, point)}: {fault.kind} at {point}")
            self.struck.append(fault)
            if fault.kind not in plot.HARMLESS:
                self.disturb(self.world.now)
            if not self._strikes.act(fault, client):
                mine.append(fault)
        return mine

    def state(self, client: Client, point: str) -> str:
        """Where the request is, one of `plot.STATES`."""
        gateway = self.processes.get(client.gateway)
        return plot.state_at(point, gateway.state(client.number) if gateway else "over")
