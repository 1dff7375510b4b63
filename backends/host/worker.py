"""The worker host: one control endpoint around one backend.

It greets gateways and hands their messages on to `requests.py`. What a gateway holds here ends
with its connection, but for what is to be kept for another one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from backends.api import Backend
from backends.errors import ProtocolError
from backends.host.config import HostConfig
from backends.host.janitor import Janitor
from backends.host.ledger import Ledger
from backends.host.listening import listen
from backends.host.loop import Unusable
from backends.host.peers import Peers
from backends.host.publishing import Publisher
from backends.host.requests import Requests
from backends.protocol import (
    CACHES,
    Adopt,
    Cancel,
    Disown,
    Door,
    Drain,
    Flow,
    Hello,
    Inspect,
    Link,
    Load,
    Meet,
    Message,
    Prefill,
    Proof,
    Refused,
    Rejected,
    Reserve,
    ToWorker,
    Welcome,
)
from backends.protocol import Ledger as LedgerAnswer
from transfer.warming import warm_up

log = structlog.get_logger()

HELLO_SECONDS = 5.0
MAX_STRANGERS = 64
"""So many connections may not have proven themselves yet; the oldest of them makes way."""

LOAD_SECONDS = 1.0
STEPS_AHEAD = 8  # more prompts than that wait in the queue, where they hold no memory
POLL_SECONDS = 0.05
GIVE_BACK_SECONDS = 5.0


@dataclass(slots=True)
class Stranger:
    """A connection that has not proven itself, and until when it may."""

    timer: asyncio.TimerHandle
    door: Door | None = None
    gateway: str = ""


class WorkerHost:
    """Hosts `backend` until drained or cancelled. `peers` makes its side of the data plane."""

    def __init__(
        self, config: HostConfig, backend: Backend, *, peers: Callable[..., Peers] = Peers
    ) -> None:
        self.config = config
        self.incarnation = time.time_ns()
        self.address = ""
        self._info = backend.info
        self._ledger = Ledger(backend.info.pool_blocks)
        self._janitor = Janitor()
        self._tasks = asyncio.TaskGroup()
        self._peers = peers(config, backend.info, backend.pool, self._broadcast)
        self._publisher = Publisher()
        self._requests = Requests(
            config,
            backend,
            self._ledger,
            self._janitor,
            self._peers.chooser,
            self.incarnation,
            self._tasks.create_task,
            lambda: self._broadcast(self._load()),
            self._publisher.changed,
        )
        self._publisher.open(self._requests.reuse.prefixes)
        self._links: set[Link] = set()
        self._strangers: dict[Link, Stranger] = {}
        self._meeting: set[tuple[Link, str]] = set()
        self.draining = asyncio.Event()

    # ---- life of the worker

    async def run(self, ready: Callable[[], None]) -> None:
        """Listen, call `ready`, serve. Returns after `drain`; a part that dies ends it all."""
        await asyncio.to_thread(warm_up)
        await self._peers.warm_up()
        sys.setswitchinterval(0.0005)  # the step thread's Python must not delay tokens by 5 ms
        if self.config.role != "prefill":
            self._requests.landings.receivers = [*await self._peers.listen()]
            self._requests.landings.stagings = self._peers.stagings
        tls = self.config.tls.server() if self.config.tls is not None else None
        server, self.address = await listen(self.config.listen, self._new_link, tls)
        try:
            async with self._tasks as tasks:
                parts = [
                    tasks.create_task(part)
                    for part in (
                        self._step(),
                        self._requests.landings.reap(),
                        self._janitor.run(),
                        self._sweep(),
                    )
                ]
                log.info("worker.started", worker=self.config.id, address=self.address)
                ready()
                await self.draining.wait()
                await self._wind_down()
                for part in parts:
                    part.cancel()
        finally:
            server.close()
            for link in [*self._links, *self._strangers]:
                link.close()
            await self._peers.close()
            self._publisher.close()
            self._requests.reuse.close()
            await self._close()
            log.info("worker.stopped", worker=self.config.id)

    def drain(self) -> None:
        """Take no new work; `run` returns when the rest is done or given back."""
        if not self.draining.is_set():
            self.draining.set()
            self._broadcast(self._load())
            log.info("worker.draining", worker=self.config.id, seconds=self.config.drain_seconds)

    @property
    def transports(self) -> tuple[str, ...]:
        """In which ways KV can reach it; known once it listens."""
        return tuple(it.endpoint.transport for it in self._requests.landings.receivers)

    def record_load(self) -> tuple[int, int]:
        """The budgets to publish: tokens whose prefill may be under way, tokens of decode KV."""
        capacity = self._info.capacity_blocks * self._info.layout.block_tokens
        under_way = min(capacity, STEPS_AHEAD * self.config.step_tokens)
        role = self.config.role
        return (0 if role == "decode" else under_way, 0 if role == "prefill" else capacity)

    async def _wind_down(self) -> None:
        requests = self._requests
        if not await self._within(self.config.drain_seconds, lambda: requests.idle):
            requests.give_back("draining", "this worker drains")
            await self._within(GIVE_BACK_SECONDS, lambda: requests.quiet)

    async def _within(self, seconds: float, done: Callable[[], bool]) -> bool:
        """Wait until `done`, and no errand is left; False: not in time."""
        try:
            async with asyncio.timeout(seconds):
                while not (done() and not self._errands):  # noqa: ASYNC110 -- three parts
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            return False
        return True

    @property
    def _errands(self) -> int:
        # Not waiting for senders that stand still: with this process, its pool is nobody's.
        return self._janitor.errands - self._requests.landings.quiescing

    async def _step(self) -> None:
        try:
            await self._requests.steps.run()
        except Unusable as error:
            log.critical("worker.broken", worker=self.config.id, cause=str(error))
            os._exit(os.EX_SOFTWARE)  # a thread that does not return would keep the process alive

    async def _close(self) -> None:
        try:
            await self._requests.steps.close()
        except Unusable as error:
            log.critical("worker.broken", worker=self.config.id, cause=str(error))
            os._exit(os.EX_SOFTWARE)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(LOAD_SECONDS)
            self._requests.expire()
            self._broadcast(self._load())

    def _load(self) -> Load:
        steps = self._requests.steps
        room = steps.room
        return Load(
            free_blocks=room.free,
            pool_blocks=room.blocks,
            running=steps.running,
            waiting=steps.waiting,
            waiting_tokens=steps.waiting_tokens,
            draining=self.draining.is_set(),
            quarantined=self._requests.landings.quarantined,
            shunned=self._requests.landings.shunned,
        )

    def _broadcast(self, message: Message) -> None:
        for link in self._links:
            link.send(message)

    # ---- connections

    def _new_link(self) -> Link:
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            self._strangers.pop(oldest).timer.cancel()
            log.warning("gateway.rejected", reason=f"{MAX_STRANGERS} others have not proven who")
            oldest.abort("too many have not proven who they are")
        link = Link(ToWorker, self._on_message, self._on_lost)
        timer = asyncio.get_running_loop().call_later(
            HELLO_SECONDS, self._reject, link, f"no greeting within {HELLO_SECONDS} s"
        )
        self._strangers[link] = Stranger(timer)
        return link

    def _on_lost(self, link: Link, reason: str) -> None:
        stranger = self._strangers.pop(link, None)
        if stranger is not None:
            stranger.timer.cancel()
        if link in self._links:
            self._links.discard(link)
            self._publisher.leave(link)
            self._requests.lose(link)
            log.info("gateway.lost", reason=reason)

    def _greet(self, link: Link, message: Message) -> None:
        """Let a gateway in that says `Hello`, and proves itself after our challenge."""
        stranger = self._strangers[link]
        try:
            match message:
                case Hello() if stranger.door is None:
                    stranger.gateway = message.gateway
                    stranger.door = Door(message, self.config.secret, version=self.config.protocol)
                    link.send(stranger.door.challenge)
                case Proof() if stranger.door is not None:
                    stranger.door.admit(message)
                    self._let_in(link, stranger.door, stranger.gateway)
                case _:
                    raise ProtocolError("the first message must be Hello, the second Proof")
        except ProtocolError as error:
            self._reject(link, str(error))

    def _let_in(self, link: Link, door: Door, gateway: str) -> None:
        self._strangers.pop(link).timer.cancel()
        self._links.add(link)
        link.trust()
        link.send(door.seal(self._welcome(door.version)))
        link.send(self._load())
        if door.version >= CACHES:
            self._publisher.follow(link)
        log.info("gateway.connected", gateway=gateway, version=door.version)

    def _welcome(self, version: int) -> Welcome:
        return Welcome(
            version=version,
            worker=self.config.id,
            incarnation=self.incarnation,
            role=self.config.role,
            info=self._info,
            endpoints=tuple(one.endpoint for one in self._requests.landings.receivers),
            left_out=self._peers.left_out,
            step_tokens=self.config.step_tokens,
        )

    def _reject(self, link: Link, reason: str) -> None:
        log.warning("gateway.rejected", reason=reason)
        link.send(Rejected(reason=reason))
        link.close()

    # ---- messages

    def _on_message(self, link: Link, message: Any) -> None:
        if link in self._strangers:
            self._greet(link, message)
            return
        match message:
            case Reserve() | Prefill() if self.draining.is_set():
                handle = message.spec.handle
                link.send(Refused(handle=handle, kind="draining", detail="this worker drains"))
            case Reserve() | Prefill() | Cancel() | Flow() | Disown() | Adopt():
                self._requests.hear(link, message)
            case Meet() if (link, message.worker) in self._meeting:
                pass  # a gateway asks again while a dead address keeps us waiting
            case Meet():
                self._meeting.add((link, message.worker))
                self._tasks.create_task(self._meet(link, message))
            case Drain():
                self.drain()
            case Inspect():
                link.send(self._inspect(message.ticket))
            case _:
                log.warning("gateway.dropped", message=type(message).__name__)
                link.close()

    async def _meet(self, link: Link, message: Meet) -> None:
        try:
            link.send(await self._peers.meet(message))
        finally:
            self._meeting.discard((link, message.worker))

    def _inspect(self, ticket: int) -> LedgerAnswer:
        pins = self._requests.steps.pins
        wrong = [*self._ledger.audit(), *pins.wrong]
        for codec, staging in self._peers.stagings.items():
            wrong += [f"{codec} codes: {it}" for it in staging.ledger.audit()]
        return LedgerAnswer(
            ticket=ticket,
            worker=self.config.id,
            pool_blocks=self._ledger.blocks,
            free_blocks=self._ledger.free,
            holders=(*self._ledger.holders(), *(("engine", *pinned) for pinned in pins.held)),
            balanced=not wrong,
            note="; ".join(wrong[:5]),
        )
