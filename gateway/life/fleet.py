"""The connections to workers: one each, kept open, with what the worker says of itself.

The fleet knows who is there and who has met whom, and passes each message on to the leg whose
handle it bears. It does not choose (`placement.py`) and does not retry (`relay.py`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from backends.protocol import (
    VERSION,
    Failed,
    FirstToken,
    Granted,
    HandedOver,
    Hello,
    Inspect,
    Landed,
    Ledger,
    Link,
    Load,
    Meet,
    Message,
    Met,
    Refused,
    Rejected,
    ToGateway,
    Token,
    Tokens,
    Welcome,
)
from gateway.admission.registry import WorkerRecord
from gateway.life.placement import Snapshot, WorkerView

log = structlog.get_logger()

CONNECT_SECONDS = 5.0
MEET_AGAIN_SECONDS = 2.0
INSPECT_SECONDS = 2.0
SILENCE_SECONDS = 10.0
SILENCE_TICKS = 5
MAX_PORT = 65535
BACKOFF_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0)

LegMessage = Granted | Refused | FirstToken | HandedOver | Landed | Failed


class LegPort(Protocol):
    """What a leg hears from the workers that carry it."""

    def token(self, row: Token) -> None:
        """One more token of one of its sequences."""

    def heard(self, worker: Worker, message: LegMessage) -> None:
        """Anything else that bears its handle."""

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker that it uses is gone."""


class Worker:
    """One connected worker. What it says besides tokens goes to `heard`."""

    def __init__(
        self,
        record: WorkerRecord,
        link: Link,
        welcome: Welcome,
        heard: Callable[[Worker, Message], None],
    ) -> None:
        self.id = record.id
        self.record = record
        self.welcome = welcome
        self.load: Load | None = None
        self.legs: dict[int, LegPort] = {}
        self.prefilling: dict[int, int] = {}
        self.silent_ticks = 0
        self._link = link
        self._heard = heard

    @property
    def identity(self) -> tuple[str, int]:
        """Names this start of this worker."""
        return self.id, self.welcome.incarnation

    def hear(self, _: Link, message: Message) -> None:
        """Take what the worker says; its tokens go straight to their legs."""
        self.silent_ticks = 0
        if type(message) is not Tokens:
            self._heard(self, message)
            return
        legs = self.legs
        for row in message.rows:
            leg = legs.get(row.handle)
            if leg is not None:
                leg.token(row)

    @property
    def shunned(self) -> tuple[str, ...]:
        """Prefill workers that it gives no landings for the time being."""
        return self.load.shunned if self.load is not None else ()

    def send(self, message: Message) -> None:
        """Dropped in silence when the connection is lost; the legs are told of that."""
        self._link.send(message)

    def give_up(self) -> None:
        """End the connection, without waiting for anything that is still to be sent."""
        self._link.abort("nothing was heard from it")

    def view(self) -> WorkerView:
        """What placement may know."""
        info, load = self.welcome.info, self.load
        return WorkerView(
            id=self.id,
            role=self.welcome.role,
            info=info,
            queued_tokens=max(
                sum(self.prefilling.values()), load.waiting_tokens if load is not None else 0
            ),
            running=load.running if load is not None else 0,
            free_blocks=load.free_blocks if load is not None else info.pool_blocks,
            draining=load.draining if load is not None else False,
        )


class Fleet:
    """All workers of one gateway. Works while `run` does.

    A worker says every second how full it is: one that says nothing for `silence_seconds` (its
    machine is gone, or it hangs) is lost.
    """

    def __init__(
        self, gateway_id: str, secret: str, *, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        self._hello = Hello(version=VERSION, gateway=gateway_id, secret=secret)
        self._silence_seconds = silence_seconds
        self._records: dict[str, WorkerRecord] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._workers: dict[str, Worker] = {}
        self._pairs: dict[tuple[tuple[str, int], tuple[str, int]], Met] = {}
        self._tasks = asyncio.TaskGroup()
        self._runs = False  # until `run`, which follows what was learnt before
        self._changed = asyncio.Event()
        self._handles = itertools.count(1)
        self._tickets: dict[int, asyncio.Future[Ledger]] = {}

    # ---- who is there

    async def run(self) -> None:
        """Keep connections until cancelled."""
        async with self._tasks as tasks:
            tasks.create_task(self._meet_again())
            tasks.create_task(self._notice_silence())
            self._runs = True
            self._follow()
            try:
                await asyncio.Event().wait()
            finally:
                self._runs = False

    def update(self, records: Mapping[str, WorkerRecord]) -> None:
        """The registry's news: connect to these, and to no others once they are gone."""
        self._records = dict(records)
        self._follow()

    def worker(self, worker_id: str) -> Worker | None:
        """The connected worker of that id."""
        return self._workers.get(worker_id)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """All connected workers."""
        return tuple(self._workers.values())

    @property
    def pairs(self) -> tuple[tuple[str, str, Met], ...]:
        """Pairs of connected workers that have met, and how that went."""
        alive = {worker.identity for worker in self._workers.values()}
        return tuple(
            (prefill[0], decode[0], met)
            for (prefill, decode), met in self._pairs.items()
            if prefill in alive and decode in alive
        )

    def snapshot(self) -> Snapshot:
        """All that placement looks at."""
        return Snapshot(
            tuple(worker.view() for worker in self._workers.values()),
            frozenset(
                (prefill, decode)
                for prefill, decode, met in self.pairs
                if not met.refusal and prefill not in self._workers[decode].shunned
            ),
        )

    def transport(self, prefill: Worker, decode: Worker) -> str:
        """What this pair agreed on; empty when it has not, or lost it again."""
        met = self._pairs.get((prefill.identity, decode.identity))
        return met.transport if met is not None else ""

    async def changed(self) -> None:
        """Return when workers, pairs or loads have changed."""
        await self._changed.wait()

    def next_handle(self) -> int:
        """A number that no other leg of this gateway has."""
        return next(self._handles)

    async def ledgers(self) -> list[Ledger]:
        """The ledger of every connected worker that answers in time."""
        loop = asyncio.get_running_loop()
        asked: dict[asyncio.Future[Ledger], int] = {}
        for worker in self.workers:
            ticket = self.next_handle()
            future: asyncio.Future[Ledger] = loop.create_future()
            self._tickets[ticket] = future
            worker.send(Inspect(ticket=ticket))
            asked[future] = ticket
        if not asked:
            return []
        try:
            done, _ = await asyncio.wait(asked, timeout=INSPECT_SECONDS)
        finally:
            for ticket in asked.values():
                del self._tickets[ticket]
        return sorted((future.result() for future in done), key=lambda ledger: ledger.worker)

    # ---- connections

    def _follow(self) -> None:
        for worker_id in self._records:
            keeper = self._keepers.get(worker_id)
            if self._runs and (keeper is None or keeper.done()):
                self._keepers[worker_id] = self._tasks.create_task(self._keep(worker_id))
        self._notify()

    async def _keep(self, worker_id: str) -> None:
        """Connect, stay, reconnect, for as long as the registry names the worker."""
        failures = 0
        while (record := self._records.get(worker_id)) is not None:
            try:
                ended = await self._connect(record)
            except (OSError, TimeoutError, ConnectionError, ValueError) as error:
                if not failures:
                    log.warning("worker.unreachable", worker=worker_id, cause=str(error))
                failures += 1
            else:
                failures = 0
                await ended
            await asyncio.sleep(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)])

    async def _connect(self, record: WorkerRecord) -> asyncio.Future[None]:
        """Greet a worker and take it in; the future is done when its connection is lost."""
        loop = asyncio.get_running_loop()
        greeting: asyncio.Future[None] = loop.create_future()
        ended: asyncio.Future[None] = loop.create_future()
        taken: list[Worker] = []

        def greeted(link: Link, message: Message) -> None:
            if greeting.done():
                return
            fault = _fault(record, message)
            if isinstance(message, Welcome) and not fault:
                worker = Worker(record, link, message, self._on_message)
                link.message = worker.hear
                taken.append(worker)
                self._take_in(worker)
                greeting.set_result(None)
            else:
                greeting.set_exception(ConnectionError(f"{record.id} is not taken: {fault}"))

        def lost(_: Link, reason: str) -> None:
            if not greeting.done():
                greeting.set_exception(ConnectionError(reason))
            if taken:
                self._lose(taken[0], reason)
            if not ended.done():
                ended.set_result(None)

        link = Link(ToGateway, greeted, lost)
        async with asyncio.timeout(CONNECT_SECONDS):
            await _dial(record.address, link)
            link.send(self._hello)
            try:
                await greeting
            except BaseException:
                link.close()
                raise
        return ended

    def _take_in(self, worker: Worker) -> None:
        self._workers[worker.id] = worker
        log.info(
            "worker.connected",
            worker=worker.id,
            role=worker.welcome.role,
            layout=worker.welcome.info.layout.fingerprint,
        )
        self._introduce()
        self._notify()

    def _lose(self, worker: Worker, reason: str) -> None:
        log.warning("worker.lost", worker=worker.id, reason=reason, legs=len(worker.legs))
        if self._workers.get(worker.id) is worker:
            del self._workers[worker.id]
        self._pairs = {
            pair: met for pair, met in self._pairs.items() if worker.identity not in pair
        }
        for leg in list(worker.legs.values()):
            leg.lost(worker, reason)
        self._notify()

    async def _notice_silence(self) -> None:
        # Ticks of our own are counted and not a clock's: were this process stopped for a while,
        # that would be no worker's silence.
        while True:
            await asyncio.sleep(self._silence_seconds / SILENCE_TICKS)
            for worker in self.workers:
                worker.silent_ticks += 1
                if worker.silent_ticks > SILENCE_TICKS:
                    worker.give_up()

    # ---- pairs

    def _introduce(self) -> None:
        """Have every prefill worker meet every decode worker that it has not met."""
        for prefill in self._workers.values():
            for decode in self._workers.values():
                if self._should_meet(prefill, decode):
                    prefill.send(
                        Meet(
                            worker=decode.id,
                            incarnation=decode.welcome.incarnation,
                            layout=decode.welcome.info.layout,
                            endpoints=decode.welcome.endpoints,
                        )
                    )

    def _should_meet(self, prefill: Worker, decode: Worker) -> bool:
        if prefill is decode or prefill.welcome.role == "decode":
            return False
        if decode.welcome.role == "prefill":
            return False
        met = self._pairs.get((prefill.identity, decode.identity))
        return met is None or bool(met.refusal)

    async def _meet_again(self) -> None:
        while True:
            await asyncio.sleep(MEET_AGAIN_SECONDS)
            self._introduce()

    def _on_met(self, prefill: Worker, met: Met) -> None:
        decode = self._workers.get(met.worker)
        if decode is None:
            return
        pair = (prefill.identity, decode.identity)
        before = self._pairs.get(pair)
        if before != met:
            log.info(
                "pair.met",
                prefill=prefill.id,
                decode=decode.id,
                transport=met.transport,
                plan=met.plan,
                reason=met.reason,
                refusal=met.refusal,
            )
        self._pairs[pair] = met
        if met.refusal and before is not None and not before.refusal:
            self._introduce()  # they have lost each other
        self._notify()

    # ---- messages

    def _on_message(self, worker: Worker, message: Message) -> None:
        match message:
            case Load():
                worker.load = message
                self._notify()
            case Met():
                self._on_met(worker, message)
            case Ledger():
                future = self._tickets.get(message.ticket)
                if future is not None and not future.done():
                    future.set_result(message)
            case Granted() | Refused() | FirstToken() | HandedOver() | Landed() | Failed():
                leg = worker.legs.get(message.handle)
                if leg is not None:
                    leg.heard(worker, message)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _fault(record: WorkerRecord, greeting: Message) -> str:
    """Why whoever greets so is not the worker that `record` names; empty when it is."""
    if isinstance(greeting, Rejected):
        return f"it refused us: {greeting.reason}"
    if not isinstance(greeting, Welcome) or greeting.version != VERSION:
        return f"it said {greeting!r:.200}"
    if greeting.worker != record.id:
        return f"{greeting.worker} answers at its address"
    return ""


async def _dial(address: str, link: Link) -> None:
    loop = asyncio.get_running_loop()
    kind, _, rest = address.partition(":")
    if kind == "unix":
        await loop.create_unix_connection(lambda: link, rest)
        return
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"address {address!r} is neither unix:/path nor tcp:host:port")
    await loop.create_connection(lambda: link, host.strip("[]"), int(port))
