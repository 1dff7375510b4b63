"""The connections to workers: one each, kept open, with what the worker says of itself.

The fleet knows who is there and who has met whom, and passes each message on to the leg whose
handle it bears. It does not choose (`gateway.placement`) and does not retry (`relay.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Callable, Mapping

import structlog

from backends.protocol import (
    DRAINS,
    VERSION,
    Adopted,
    Cached,
    Caller,
    Drain,
    Failed,
    FirstToken,
    Granted,
    HandedOver,
    Inspect,
    Landed,
    Ledger,
    Load,
    Message,
    Met,
    Refused,
)
from gateway.admission.registry import WorkerRecord
from gateway.errors import BadRequest, DeadlineExceeded, NoSuchWorker
from gateway.life.breakers import Breakers
from gateway.life.pairs import Pairs
from gateway.life.worker import Worker, connect
from gateway.placement import Booking, Books, Placement, Snapshot, Wish, WorkerView

log = structlog.get_logger()

MEET_AGAIN_SECONDS = 2.0
INSPECT_SECONDS = 2.0
SILENCE_SECONDS = 10.0
SILENCE_TICKS = 5
BACKOFF_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0)


class Fleet:
    """All workers of one gateway. Works while `run` does.

    A worker says every second how full it is: one that says nothing for `silence_seconds` (its
    machine is gone, or it hangs) is lost. With `tls`, connections over TCP use it.
    """

    def __init__(
        self,
        gateway_id: str,
        secret: str,
        *,
        tls: ssl.SSLContext | None = None,
        version: int = VERSION,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._gateway_id = gateway_id
        self._secret = secret
        self._tls = tls
        self._version = version
        self._silence_seconds = silence_seconds
        self._records: dict[str, WorkerRecord] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._workers: dict[str, Worker] = {}
        self._pairs = Pairs(self._workers, self._notify)
        self.breakers = Breakers(_now, _later, self._notify)
        self._unreachable: dict[str, str] = {}
        self._tasks = asyncio.TaskGroup()
        self._runs = False  # until `run`, which follows what was learnt before
        self._changed = asyncio.Event()
        self._handles = itertools.count(1)
        self._tickets: dict[int, asyncio.Future[Ledger]] = {}
        self._books = Books(self._notify)

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
        self.breakers.forget({*self._records, *self._workers})
        self._follow()

    @property
    def named(self) -> frozenset[str]:
        """Ids of the workers that the registry names, connected or not."""
        return frozenset(self._records)

    def worker(self, worker_id: str) -> Worker | None:
        """The connected worker of that id."""
        return self._workers.get(worker_id)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """All connected workers."""
        return tuple(self._workers.values())

    @property
    def unreachable(self) -> tuple[tuple[WorkerRecord, str], ...]:
        """Workers that have registered and are not connected, and why."""
        return tuple(
            (self._records[worker_id], cause)
            for worker_id, cause in sorted(self._unreachable.items())
            if worker_id in self._records
        )

    @property
    def pairs(self) -> tuple[tuple[str, str, Met], ...]:
        """Pairs of connected workers that have met, and how that went."""
        return self._pairs.met

    def snapshot(self) -> Snapshot:
        """All that placement looks at."""
        now = asyncio.get_running_loop().time()
        views = [self._view(worker, now) for worker in self._workers.values()]
        able = self._pairs.able
        left_alone = {pair: why for pair in able if (why := self.breakers.why(pair))}
        return self._books.snapshot(views, able - left_alone.keys(), left_alone)

    def book(self, placement: Placement, wish: Wish) -> Booking:
        """Book a placement of connected workers, so that the next snapshot has it."""
        holder = self._workers[placement.decode or placement.prefill]
        block_tokens = holder.welcome.info.layout.block_tokens
        now = asyncio.get_running_loop().time()
        return self._books.place(placement, wish, block_tokens, now)

    def transport(self, prefill: Worker, decode: Worker) -> str:
        """What this pair agreed on; empty when it has not, or lost it again."""
        return self._pairs.transport(prefill, decode)

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

    async def drain(self, worker_id: str) -> None:
        """Have a worker take no new work, finish or give back the rest, and leave.

        Raises:
            NoSuchWorker: it is not connected here.
            BadRequest: its version of the protocol has no such order.
            DeadlineExceeded: it did not say in time that it has begun.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            known = ", ".join(sorted(self._workers)) or "none"
            raise NoSuchWorker(f"no worker `{worker_id[:128]}` is connected; there are: {known}")
        if worker.welcome.version < DRAINS:
            message = f"{worker_id} is too old to be told so: send its process SIGTERM"
            raise BadRequest(message, code="worker_too_old")
        worker.send(Drain())
        try:
            async with asyncio.timeout(INSPECT_SECONDS):
                while not worker.draining and self._workers.get(worker_id) is worker:
                    await self.changed()
        except TimeoutError:
            raise DeadlineExceeded(f"asking {worker_id} to drain") from None

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
                cause = str(error) or type(error).__name__
                if not failures:
                    log.warning("worker.unreachable", worker=worker_id, cause=cause)
                self._unreachable[worker_id] = cause
                failures += 1
            else:
                self._unreachable.pop(worker_id, None)
                failures = 0
                await ended
            await asyncio.sleep(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)])
        self._unreachable.pop(worker_id, None)

    async def _connect(self, record: WorkerRecord) -> asyncio.Future[None]:
        caller = Caller(self._gateway_id, self._secret, version=self._version)
        return await connect(record, caller, self._tls, self._on_message, self._take_in, self._lose)

    def _take_in(self, worker: Worker) -> None:
        self._workers[worker.id] = worker
        log.info(
            "worker.connected",
            worker=worker.id,
            role=worker.welcome.role,
            layout=worker.welcome.info.layout.fingerprint,
            emulated=worker.emulated,
        )
        self._pairs.introduce()
        self._notify()

    def _lose(self, worker: Worker, reason: str) -> None:
        if worker.draining and not worker.legs:
            log.info("worker.left", worker=worker.id)
        else:
            self.breakers.failed(worker.id, f"it was lost: {reason}", _now())
            log.warning("worker.lost", worker=worker.id, reason=reason, legs=len(worker.legs))
        if self._workers.get(worker.id) is worker:
            del self._workers[worker.id]
        self._pairs.forget(worker)
        self._books.forget(worker.id)
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

    async def _meet_again(self) -> None:
        while True:
            await asyncio.sleep(MEET_AGAIN_SECONDS)
            self._pairs.introduce()

    # ---- messages

    def _on_message(self, worker: Worker, message: Message) -> None:
        match message:
            case Load():
                self._on_load(worker, message)
            case Cached():
                worker.cached.hear(message)
            case Met():
                self._pairs.heard(worker, message)
            case Ledger():
                future = self._tickets.get(message.ticket)
                if future is not None and not future.done():
                    future.set_result(message)
            case (
                Granted()
                | Refused()
                | FirstToken()
                | HandedOver()
                | Landed()
                | Failed()
                | Adopted()
            ):
                leg = worker.legs.get(message.handle)
                if leg is not None:
                    leg.heard(worker, message)

    def _on_load(self, worker: Worker, load: Load) -> None:
        worker.load = load
        self._books.told(
            worker.id,
            waiting_tokens=load.waiting_tokens,
            running=load.running,
            free_blocks=load.free_blocks,
        )
        pace = worker.pace(asyncio.get_running_loop().time())
        if pace is not None:
            self._books.stepped(worker.id, worker.welcome.info.max_batch, pace)
        self._notify()

    def _view(self, worker: Worker, now: float) -> WorkerView:
        welcome = worker.welcome
        return self._books.view(
            worker.id,
            welcome.role,
            welcome.info,
            now,
            draining=worker.draining,
            left_alone=self.breakers.why(worker.id),
            step_tokens=welcome.step_tokens,
            kept=worker.cached.marks,
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _later(at: float, call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_at(at, call)
