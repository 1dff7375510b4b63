"""Take a turn: wait in the shared queue until there is room, hold a lease, give it back.

Atomic decisions are in the Lua scripts; this side asks them, waits, renews what it holds, and
gives back what is over, whatever ended it. Every script may be repeated, so a lost answer is
never a lost ticket. Start with `Admission.turn`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import msgspec
import structlog
from redis.asyncio import Redis

from gateway.admission.client import listen
from gateway.admission.pipe import Argument, Pipe
from gateway.admission.scripts import Keys, ScriptName, lifetime_ms
from gateway.config import Config
from gateway.errors import DeadlineExceeded, NoWorkers, QueueFull, QueueUnavailable

log = structlog.get_logger()

HIGHEST_PRIORITY = 7
LOWEST_PRIORITY = -8
RENEW_AT_ONCE = 500
GRANTED, WAITING, REFUSED = 1, 0, -1


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to run one request. `deadline` is a time of this process's event-loop clock.

    `prefill_tokens` are computed first, `decode_tokens` are the most KV that it will hold. A
    higher `priority` (-8 to 7) goes first.
    """

    id: str
    model: str
    tenant: str
    prefill_tokens: int
    decode_tokens: int
    deadline: float
    priority: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many wait, how long a lease is, and how long to hope."""

    max_waiting: int = 1024
    lease_seconds: float = 10.0
    worker_wait_seconds: float = 30.0
    outage_seconds: float = 5.0
    timeout_seconds: float = 2.0

    @classmethod
    def of(cls, config: Config) -> Self:
        """The limits that the configuration sets."""
        return cls(
            max_waiting=config.queue.max_waiting,
            lease_seconds=config.queue.lease_seconds,
            worker_wait_seconds=config.queue.worker_wait_seconds,
            outage_seconds=config.redis.outage_seconds,
            timeout_seconds=config.redis.timeout_seconds,
        )


class _Turn:
    """A ticket in the hands of this gateway."""

    __slots__ = ("asked", "granted", "held", "name", "prefill_tokens", "ticket")

    def __init__(
        self, name: str, ticket: Ticket, granted: asyncio.Future[QueueUnavailable | None]
    ) -> None:
        self.name = name  # in Redis; a client may choose its request's id, and choose it twice
        self.ticket = ticket
        self.granted = granted
        self.prefill_tokens = ticket.prefill_tokens
        self.asked = False
        self.held = False


class Grant:
    """The right to run, until the turn is left."""

    def __init__(self, turn: _Turn, leaving: asyncio.Queue[tuple[str, str, bool]]) -> None:
        self._turn = turn
        self._leaving = leaving

    def prefilled(self) -> None:
        """Prefill is done: the next one may have its room. Safe to call twice."""
        if self._turn.prefill_tokens:
            self._turn.prefill_tokens = 0
            self._leaving.put_nowait((self._turn.ticket.model, self._turn.name, False))


class Admission:
    """One gateway's place at the queue. Works while `run` does.

    `gateway_id` names this process and no other, earlier ones included.
    """

    def __init__(self, redis: Redis, deployment: str, gateway_id: str, limits: Limits) -> None:
        self._redis = redis
        self._keys = Keys(deployment)
        self._gateway = gateway_id
        self._limits = limits
        self._first_words: tuple[Argument, ...] = (
            self._keys.prefix,
            lifetime_ms(limits.lease_seconds),
            int(limits.lease_seconds * 1000),
            gateway_id,
        )
        self._key_names: dict[str, tuple[str, ...]] = {}
        self._turns: dict[str, _Turn] = {}
        self._taken = 0
        self._staffed: dict[str, bool] = {}
        self._depth: dict[str, int] = {}
        self._leaving: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()
        self._renew_now = asyncio.Event()
        self._giving_up: asyncio.TimerHandle | None = None
        self._pipe = Pipe(
            redis,
            use="queue",
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

    async def flush(self, seconds: float = 1.0) -> None:
        """Wait until everything that was given back has reached the queue, or time is up."""
        try:
            async with asyncio.timeout(seconds):
                await self._leaving.join()
        except TimeoutError:
            log.warning("lease.abandoned", count=self._leaving.qsize())

    @asynccontextmanager
    async def turn(self, ticket: Ticket) -> AsyncGenerator[Grant]:
        """Wait for this ticket's turn and hold its lease inside.

        Leaving the context, by whatever door, gives the lease or the place in line back.

        Raises:
            QueueFull: too many wait already.
            QueueUnavailable: Redis is not there, or was lost for too long while waiting.
            NoWorkers: no worker was there for `worker_wait_seconds`, or until the deadline.
            DeadlineExceeded: the deadline passed in the queue.
        """
        self._taken += 1
        name = f"{self._gateway}:{self._taken}"
        turn = _Turn(name, ticket, asyncio.get_running_loop().create_future())
        self._turns[name] = turn
        try:
            await self._wait(turn)
            yield Grant(turn, self._leaving)
        finally:
            del self._turns[name]
            if turn.asked:
                self._leaving.put_nowait((ticket.model, name, True))

    # ---- waiting ---------------------------------------------------------------------------

    async def _wait(self, turn: _Turn) -> None:
        began = asyncio.get_running_loop().time()
        if not self._pipe.ready:
            raise QueueUnavailable("Redis does not answer")
        await self._enqueue(turn)
        if not turn.granted.done():
            log.info("request.queued", request=turn.ticket.id, model=turn.ticket.model)
            await self._until_granted(turn, began)
        failure = turn.granted.result()
        if failure is not None:
            raise failure
        waited = asyncio.get_running_loop().time() - began
        log.debug("request.granted", request=turn.ticket.id, queue_ms=round(waited * 1000, 2))

    async def _enqueue(self, turn: _Turn) -> None:
        ticket = turn.ticket
        patience = ticket.deadline - asyncio.get_running_loop().time()
        if patience <= 0:
            raise DeadlineExceeded("queued")
        turn.asked = True
        priority = min(max(ticket.priority, LOWEST_PRIORITY), HIGHEST_PRIORITY)
        state, staffed, granted = await self._script(
            "enqueue",
            ticket.model,
            turn.name,
            ticket.prefill_tokens,
            ticket.decode_tokens,
            int(patience * 1000) + 1,
            ticket.tenant,
            HIGHEST_PRIORITY - priority,
            self._limits.max_waiting,
        )
        self._staffed[ticket.model] = bool(staffed)
        self._grant(map(bytes.decode, granted))
        if state == GRANTED:
            self._grant([turn.name])
        elif state == REFUSED:
            turn.asked = False
            raise QueueFull(f"{self._limits.max_waiting} requests are waiting already")

    async def _until_granted(self, turn: _Turn, began: float) -> None:
        loop = asyncio.get_running_loop()
        ticket = turn.ticket
        hope = began + self._limits.worker_wait_seconds
        while not turn.granted.done():
            until = min(ticket.deadline, hope)
            await asyncio.wait([turn.granted], timeout=max(0.0, until - loop.time()))
            if turn.granted.done():
                return
            staffed = self._staffed.get(ticket.model, False)
            if loop.time() >= ticket.deadline:
                if staffed:
                    raise DeadlineExceeded("queued")
                raise NoWorkers(f"no workers serve {ticket.model}")
            if loop.time() >= hope:
                if not staffed and self._pipe.ready:
                    raise NoWorkers(f"no workers serve {ticket.model}")
                hope = loop.time() + max(1.0, self._limits.worker_wait_seconds)

    def _grant(self, names: Iterable[str]) -> None:
        for name in names:
            turn = self._turns.get(name)
            if turn is not None and not turn.granted.done():
                turn.held = True
                turn.granted.set_result(None)

    def _on_grants(self, message: bytes) -> None:
        self._grant(msgspec.msgpack.decode(message, type=list[str]))

    # ---- what runs beside ------------------------------------------------------------------

    async def _give_back_forever(self) -> None:
        """Hand over what was left behind, as many as there are in one call."""
        while True:
            batch = [await self._leaving.get()]
            while not self._leaving.empty():
                batch.append(self._leaving.get_nowait())
            for model in {item[0] for item in batch}:
                over = [ticket for name, ticket, done in batch if name == model and done]
                prefilled = [ticket for name, ticket, done in batch if name == model and not done]
                await self._leave(model, over, prefilled)
            for _ in batch:
                self._leaving.task_done()

    async def _leave(self, model: str, over: list[str], prefilled: list[str]) -> None:
        while True:
            await self._pipe.until_ready()
            try:
                granted = await self._script("leave", model, len(over), *over, *prefilled)
            except QueueUnavailable as error:
                log.warning("lease.unreturned", count=len(over), cause=str(error))
                await asyncio.sleep(0.05)
            else:
                self._grant(map(bytes.decode, granted))
                return

    async def _renew_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._limits.lease_seconds / 3):
                    await self._renew_now.wait()
            except TimeoutError:
                pass
            self._renew_now.clear()
            if self._pipe.ready:
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
        models = {turn.ticket.model for turn in self._turns.values()} or set(self._depth)
        for model in models:
            await self._renew_model(model)
        if not models:
            lease_ms = int(self._limits.lease_seconds * 1000)
            alive = self._keys.gateway(self._gateway)
            await self._pipe.ask("SET", alive, 1, "PX", lease_ms)

    async def _renew_model(self, model: str) -> None:
        turns = [turn for turn in self._turns.values() if turn.asked and turn.ticket.model == model]
        for first in range(0, max(1, len(turns)), RENEW_AT_ONCE):
            await self._renew_some(model, turns[first : first + RENEW_AT_ONCE])

    async def _renew_some(self, model: str, turns: Sequence[_Turn]) -> None:
        # A turn that ended meanwhile is left out: its going is on its way, and must not be undone.
        turns = [turn for turn in turns if turn.name in self._turns]
        held = [turn for turn in turns if turn.held]
        words: list[Argument] = [len(held)]
        for turn in held:
            ticket = turn.ticket
            words += [turn.name, turn.prefill_tokens, ticket.decode_tokens, ticket.tenant]
        words += [turn.name for turn in turns if not turn.held]
        staffed, depth, granted, unknown = await self._script("renew", model, *words)
        self._staffed[model] = bool(staffed)
        self._depth[model] = depth
        self._grant(map(bytes.decode, granted))
        for encoded in unknown:
            lost = self._turns.get(encoded.decode())
            if lost is not None and not lost.granted.done():
                await self._enqueue_again(lost)

    async def _enqueue_again(self, turn: _Turn) -> None:
        try:
            await self._enqueue(turn)
        except (QueueFull, DeadlineExceeded, QueueUnavailable) as error:
            log.warning("request.unqueued", request=turn.ticket.id, cause=str(error))

    def _on_lost(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
        loop = asyncio.get_running_loop()
        self._giving_up = loop.call_later(self._limits.outage_seconds, self._give_up)

    def _give_up(self) -> None:
        for turn in self._turns.values():
            if not turn.granted.done():
                turn.granted.set_result(QueueUnavailable("Redis was lost while the request waited"))

    async def _script(self, name: ScriptName, model: str, *words: Argument) -> Any:
        keys = self._key_names.get(model)
        if keys is None:
            keys = self._key_names[model] = self._keys.queue(model)
        return await self._pipe.ask_script(name, keys, *self._first_words, *words)
