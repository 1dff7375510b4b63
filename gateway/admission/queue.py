"""Take a turn: wait in the shared queue until there is room, hold a lease, give it back.

Atomic decisions are in the Lua scripts; this side asks them, waits, renews what it holds, and
gives back what is over, whatever ended it. Every script may be repeated, so a lost answer is
never a lost ticket. Start with `Admission.turn`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog
from redis.asyncio import Redis

from gateway.admission.client import listen
from gateway.admission.pipe import Argument, Pipe
from gateway.admission.scripts import Keys, ScriptName, lifetime_ms
from gateway.admission.ticket import Limits, Ticket
from gateway.admission.turn import Grant, Left, Turn
from gateway.admission.wishes import (
    Enqueue,
    Leave,
    Renew,
    Report,
    Requeue,
    Wish,
    pairs,
    quota_of,
)
from gateway.errors import (
    DeadlineExceeded,
    NoWorkers,
    QueueFull,
    QueueUnavailable,
    TakenOver,
    TenantOverLimit,
)
from gateway.quota import Quota

log = structlog.get_logger()

RENEW_AT_ONCE = 500
GATHER_SECONDS = 0.02
REFUSED_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.0125, 1.0
GRANTED, FULL, LIMITED, TAKEN = 1, -1, -2, -3
_ENCODER = msgspec.msgpack.Encoder()


def _nobody(_: Quota) -> None:
    return


class Admission:
    """One gateway's place at the queue. Works while `run` does.

    `gateway_id` names this process and no other, earlier ones included.
    """

    def __init__(self, redis: Redis, deployment: str, gateway_id: str, limits: Limits) -> None:
        self._redis = redis
        self._keys = Keys(deployment)
        self._gateway = gateway_id
        self._limits = limits
        self._lifetimes = (lifetime_ms(limits.lease_seconds), int(limits.lease_seconds * 1000))
        self._turns: dict[str, Turn] = {}
        self._taken = 0
        self._unstaffed: dict[str, float] = {}  # since when, by the loop's clock
        self._depth: dict[str, int] = {}
        self._leaving: asyncio.Queue[Left] = asyncio.Queue()
        self._renew_now = asyncio.Event()
        self._looks: dict[str, asyncio.TimerHandle] = {}
        self._giving_up: asyncio.TimerHandle | None = None
        self._pipe = Pipe(
            redis,
            use="queue",
            scripts=("enqueue", "leave", "requeue", "renew"),
            timeout_seconds=limits.timeout_seconds,
            greet=self._claim,
            lost=self._on_lost,
        )

    @property
    def available(self) -> bool:
        """Whether Redis answers."""
        return self._pipe.ready

    @property
    def waiting(self) -> int:
        """How many of this gateway's requests wait."""
        return sum(not turn.held for turn in self._turns.values())

    @property
    def held(self) -> int:
        """How many leases this gateway holds."""
        return sum(turn.held for turn in self._turns.values())

    def depth(self, model: str) -> int:
        """How many requests of all gateways waited for `model` when this was last heard."""
        return self._depth.get(model, 0)

    async def until_available(self) -> None:
        """Return once Redis answers."""
        await self._pipe.until_ready()

    async def run(self) -> None:
        """Renew, listen and give back, until cancelled.

        Raises:
            RedisUnsuitable: inside a group, when the server can never be used.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pipe.run())
                tasks.create_task(self._renew_forever())
                tasks.create_task(self._give_back_forever())
                tasks.create_task(
                    listen(
                        self._redis,
                        self._keys.grants(self._gateway),
                        heard=self._on_grants,
                        gap=self._renew_now.set,
                        quiet_seconds=self._limits.lease_seconds / 3,
                    )
                )
        finally:
            for timer in self._looks.values():
                timer.cancel()

    async def flush(self, seconds: float = 1.0) -> None:
        """Wait until everything that was given back has reached the queue, or time is up."""
        try:
            async with asyncio.timeout(seconds):
                await self._leaving.join()
        except TimeoutError:
            log.warning("lease.abandoned", count=self._leaving.qsize())

    @asynccontextmanager
    async def turn(
        self,
        ticket: Ticket,
        *,
        told: Callable[[Quota], None] = _nobody,
        generated: Callable[[], int] = int,
    ) -> AsyncGenerator[Grant]:
        """Wait for this ticket's turn and hold its lease inside.

        Leaving the context, by whatever door, gives the lease or the place in line back; its
        tenant is then charged for as many tokens as `generated` says, and not for those that were
        expected. `told` hears once what is left to the tenant, as soon as the ticket is in line.

        Raises:
            QueueFull: too many wait already.
            TenantOverLimit: its tenant has used up what it may.
            QueueUnavailable: Redis is not there, or was lost for too long while waiting.
            NoWorkers: no worker was there for `worker_wait_seconds`, or until the deadline.
            DeadlineExceeded: the deadline passed in the queue, or cannot be met any more.
            TakenOver: another gateway enqueued a ticket of this name.
        """
        self._taken += 1
        name = ticket.name or f"{self._gateway}:{self._taken}"
        self._on_taken_over(name)
        turn = self._turns[name] = Turn(name, self._taken, ticket, told)
        try:
            await self._wait(turn)
            yield Grant(turn, self._leaving, self._again)
        finally:
            if self._turns.get(name) is turn:
                del self._turns[name]
            if turn.asked:
                self._leaving.put_nowait(Left(ticket.model, name, turn.visit, generated()))

    # ---- waiting ---------------------------------------------------------------------------

    async def _wait(self, turn: Turn) -> None:
        began = asyncio.get_running_loop().time()
        if not self._pipe.ready:
            raise QueueUnavailable("Redis does not answer")
        await self._enqueue(turn)
        if not turn.granted.done():
            log.info("request.queued", request=turn.ticket.id, model=turn.ticket.model)
        await self._until_granted(turn)
        waited = asyncio.get_running_loop().time() - began
        log.debug("request.granted", request=turn.ticket.id, queue_ms=round(waited * 1000, 2))

    async def _enqueue(self, turn: Turn, *, again: bool = False) -> None:
        ticket = turn.ticket
        now = asyncio.get_running_loop().time()
        if turn.due <= now:
            raise DeadlineExceeded("queued")
        # What is granted at once is not called late here: how long it takes will be measured.
        patience = max(0.0, turn.latest - now)
        turn.asked = True
        wish = Enqueue(
            id=turn.name,
            ticket=turn.words,
            patience=int(patience * 1000) + 1,
            deadline=int((turn.due - now) * 1000) + 1,
            max_waiting=self._limits.max_waiting,
            again=again,
        )
        report, state, after_ms, quota = await self._script("enqueue", ticket.model, wish)
        self._take_home(ticket.model, report)
        if state == TAKEN:
            turn.asked = False
            raise TakenOver(ticket.id)
        if state in (FULL, LIMITED):
            turn.asked = False
            if state == LIMITED:
                raise TenantOverLimit(ticket.tenant, after_ms / 1000, quota_of(quota))
            count = self._limits.max_waiting
            raise QueueFull(f"{count} requests are waiting already", retry_after=after_ms / 1000)
        if quota and not again:
            turn.told(quota_of(quota))

    async def _until_granted(self, turn: Turn) -> None:
        """Return once it is granted; raise what keeps it from being."""
        loop = asyncio.get_running_loop()
        model, began = turn.ticket.model, loop.time()
        while not turn.granted.done():
            hope = self._hope(model, began)
            until = min(turn.latest, hope)
            await asyncio.wait([turn.granted], timeout=max(0.0, until - loop.time()))
            if turn.granted.done():
                break
            if loop.time() >= turn.latest and model not in self._unstaffed:
                raise DeadlineExceeded("queued")
            if loop.time() >= min(turn.latest, self._hope(model, began)):
                raise NoWorkers(f"no workers serve {model}")
        failure = turn.granted.result()
        if failure is not None:
            raise failure

    def _hope(self, model: str, began: float) -> float:
        """Until when whoever waits since `began` hopes for workers.

        Where there are some, or nobody can tell, it is when to look again.
        """
        patience, since = self._limits.worker_wait_seconds, self._unstaffed.get(model)
        if since is None:
            return asyncio.get_running_loop().time() + max(1.0, patience)
        return max(began, since) + patience

    async def _again(self, turn: Turn, worker: str, kind: str) -> None:
        """See `Grant.again`. While Redis is away, a right that was granted is kept.

        Workers that offer room and refuse again and again are asked ever more rarely.
        """
        self._check_place(turn)
        turn.refusals += 1
        turn.wait()
        patience = max(0.0, turn.latest - asyncio.get_running_loop().time())
        wish = Requeue(
            turn.name, turn.epoch, worker, kind, turn.prefill_tokens, int(patience * 1000) + 1
        )
        pause = min(REFUSED_PAUSE_SECONDS * 2**turn.refusals, LONGEST_PAUSE_SECONDS)
        try:
            report, state = await self._script("requeue", turn.ticket.model, wish)
        except QueueUnavailable:
            self._check_place(turn)
            turn.held = True
            await asyncio.sleep(pause)
            return
        log.info("request.requeued", request=turn.ticket.id, worker=worker, kind=kind)
        self._take_home(turn.ticket.model, report)
        if state == GRANTED and turn.refusals > 1:
            await asyncio.sleep(pause)
        await self._until_granted(turn)

    def _check_place(self, turn: Turn) -> None:
        """Raise TakenOver where it is somebody else's by now: nobody would grant it any more."""
        if self._turns.get(turn.name) is not turn:
            raise TakenOver(turn.ticket.id)

    def _take_home(self, model: str, answer: list[Any]) -> None:
        report = Report(*answer)
        if report.staffed:
            self._unstaffed.pop(model, None)
        else:
            self._unstaffed.setdefault(model, asyncio.get_running_loop().time())
        self._depth[model] = report.depth
        self._grant(report.grants())
        if report.look_ms and model not in self._looks:
            loop = asyncio.get_running_loop()
            self._looks[model] = loop.call_later(report.look_ms / 1000, self._look, model)

    def _grant(self, grants: list[tuple[str, int]]) -> None:
        for name, epoch in grants:
            turn = self._turns.get(name)
            if turn is not None:
                turn.grant(epoch)

    def _on_grants(self, message: bytes) -> None:
        self._grant(pairs(msgspec.msgpack.decode(message)))

    # ---- what runs beside ------------------------------------------------------------------

    def _look(self, model: str) -> None:
        """See whether there is room by now: a worker that refused may have some."""
        del self._looks[model]
        self._leaving.put_nowait(Left(model, ""))

    async def _give_back_forever(self) -> None:
        """Hand over what was left behind, as many as there are in one call.

        Where nobody waits, nobody minds if some more are awaited first.
        """
        while True:
            batch = [await self._leaving.get()]
            if not self._depth.get(batch[0].model):
                await asyncio.sleep(GATHER_SECONDS)
            while not self._leaving.empty():
                batch.append(self._leaving.get_nowait())
            for model in {item.model for item in batch}:
                items = [item for item in batch if item.model == model and item.name]
                over = [(item.name, item.visit, item.generated) for item in items if not item.epoch]
                prefilled = [(item.name, item.epoch) for item in items if item.epoch]
                await self._leave(model, Leave(over, prefilled))
            for _ in batch:
                self._leaving.task_done()

    async def _leave(self, model: str, wish: Leave) -> None:
        while True:
            await self._pipe.until_ready()
            try:
                (report,) = await self._script("leave", model, wish)
            except QueueUnavailable as error:
                log.warning("lease.unreturned", count=len(wish.over), cause=str(error))
                await asyncio.sleep(0.05)
            else:
                self._take_home(model, report)
                return

    async def _renew_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._limits.lease_seconds / 3):
                    await self._renew_now.wait()
            except TimeoutError:
                pass
            await self._pipe.until_ready()
            self._renew_now.clear()
            try:
                await self._renew()
            except QueueUnavailable as error:
                log.warning("lease.unrenewed", cause=str(error))

    async def _claim(self) -> None:
        """First on a new connection: say what we hold, before anybody is served or reaped."""
        await self._renew()
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    async def _renew(self) -> None:
        models = {turn.ticket.model for turn in self._turns.values()} | set(self._depth)
        for model in models:
            await self._renew_model(model)
        if not models:
            lease_ms = int(self._limits.lease_seconds * 1000)
            alive = self._keys.gateway(self._gateway)
            await self._pipe.ask("SET", alive, 1, "PX", lease_ms)

    async def _renew_model(self, model: str) -> None:
        turns = [turn for turn in self._turns.values() if turn.asked and turn.ticket.model == model]
        for first in range(0, max(1, len(turns)), RENEW_AT_ONCE):
            some = turns[first : first + RENEW_AT_ONCE]
            await self._renew_some(model, some, last=first + RENEW_AT_ONCE >= len(turns))

    async def _renew_some(self, model: str, turns: Sequence[Turn], *, last: bool) -> None:
        # A turn that ended meanwhile is left out: its going is on its way, and must not be undone.
        turns = [turn for turn in turns if self._turns.get(turn.name) is turn]
        wish = Renew(
            last=last,
            held=[(turn.name, turn.epoch, turn.words) for turn in turns if turn.held],
            waiting=[turn.name for turn in turns if not turn.held],
        )
        report, unknown, lost = await self._script("renew", model, wish)
        self._take_home(model, report)
        for name in map(bytes.decode, lost):
            self._on_taken_over(name)
        for name in map(bytes.decode, unknown):
            turn = self._turns.get(name)
            if turn is not None and not turn.granted.done():
                await self._enqueue_again(turn)

    async def _enqueue_again(self, turn: Turn) -> None:
        try:
            await self._enqueue(turn, again=True)
        except TakenOver:
            self._on_taken_over(turn.name)
        except (DeadlineExceeded, QueueUnavailable) as error:
            log.warning("request.unqueued", request=turn.ticket.id, cause=str(error))

    def _on_taken_over(self, name: str) -> None:
        turn = self._turns.pop(name, None)
        if turn is not None:
            log.warning("lease.taken_over", request=turn.ticket.id)
            turn.fail(TakenOver(turn.ticket.id))

    def _on_lost(self) -> None:
        self._unstaffed.clear()
        if self._giving_up is not None:
            self._giving_up.cancel()
        loop = asyncio.get_running_loop()
        self._giving_up = loop.call_later(self._limits.outage_seconds, self._give_up)

    def _give_up(self) -> None:
        for turn in self._turns.values():
            turn.fail(QueueUnavailable("Redis was lost while the request waited"))

    async def _script(self, name: ScriptName, model: str, wish: Wish) -> Any:
        words: tuple[Argument, ...] = (
            *(self._keys.prefix, model, *self._lifetimes, self._gateway),
            *(self._pipe.server, self._pipe.former_server, _ENCODER.encode(wish)),
        )
        return await self._pipe.ask_script(name, (self._keys.room(model),), *words)
