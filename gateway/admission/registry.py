"""Which workers there are: they say so themselves, again and again, and gateways listen.

A record in Redis lapses with its worker. What the gateways have learnt outlives an outage of
Redis: a worker's control connection tells the truth about it. Start with `WorkerRecord`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import structlog
from redis.asyncio import Redis

from backends.protocol import Role
from gateway.admission.client import listen
from gateway.admission.pipe import Argument, Pipe
from gateway.admission.scripts import Keys, ScriptName, lifetime_ms
from gateway.admission.wishes import Publish, Withdraw
from gateway.errors import QueueUnavailable

log = structlog.get_logger()

POLL_SECONDS = 1.0


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself: where its control connection is, and what it offers.

    `layout` is the fingerprint of how it cuts its pool, `transports` how KV can reach it.
    `prefill_tokens` and `decode_tokens` are how much it can hold of each at once; 0 for what its
    role does not do. How much of that is granted, the queue keeps beside it. A greater
    `incarnation` of the same `id` replaces a smaller one.
    """

    id: str
    incarnation: int
    role: Role
    model: str
    address: str
    prefill_tokens: int
    decode_tokens: int
    layout: str = ""
    transports: tuple[str, ...] = ()


class Registration:
    """A worker's record in Redis, kept alive by `run`."""

    def __init__(
        self,
        redis: Redis,
        deployment: str,
        record: WorkerRecord,
        *,
        lease_seconds: float = 10.0,
        timeout_seconds: float = 2.0,
    ) -> None:
        self._keys = Keys(deployment)
        self._record = record
        self._lease_seconds = lease_seconds
        self._pipe = Pipe(
            redis,
            use="registration",
            scripts=("publish", "withdraw"),
            timeout_seconds=timeout_seconds,
            greet=self._publish,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Repeat the record until `stop` is set, then take it back.

        Raises:
            RedisUnsuitable: inside a group, when the server can never be used.
        """
        async with asyncio.TaskGroup() as tasks:
            pipe = tasks.create_task(self._pipe.run())
            while not stop.is_set():
                try:
                    async with asyncio.timeout(self._lease_seconds / 3):
                        await stop.wait()
                except TimeoutError:
                    await self._quietly(self._publish)
            await self._quietly(self._withdraw)
            pipe.cancel()

    async def _quietly(self, act: Callable[[], Any]) -> None:
        if self._pipe.ready:
            try:
                await act()
            except QueueUnavailable as error:
                log.warning("worker.unpublished", worker=self._record.id, cause=str(error))

    async def _publish(self) -> None:
        record = self._record
        wish = Publish(
            incarnation=record.incarnation,
            prefill=record.prefill_tokens,
            decode=record.decode_tokens,
        )
        accepted = await self._script("publish", wish, msgspec.msgpack.encode(record))
        if not accepted:
            log.warning("worker.superseded", worker=record.id, incarnation=record.incarnation)

    async def _withdraw(self) -> None:
        await self._script("withdraw", Withdraw(self._record.incarnation))

    async def _script(self, name: ScriptName, wish: Publish | Withdraw, *words: Argument) -> Any:
        return await self._pipe.ask_script(
            name,
            (self._keys.room(self._record.model),),
            self._keys.prefix,
            self._record.model,
            lifetime_ms(self._lease_seconds),
            int(self._lease_seconds * 1000),
            self._record.id,
            self._pipe.server,
            self._pipe.former_server,
            msgspec.msgpack.encode(wish),
            *words,
        )


class Registry:
    """A gateway's view of all workers, kept by `watch`."""

    def __init__(
        self,
        redis: Redis,
        deployment: str,
        *,
        lease_seconds: float = 10.0,
        timeout_seconds: float = 2.0,
    ) -> None:
        self._redis = redis
        self._keys = Keys(deployment)
        self._lease_seconds = lease_seconds
        self._pipe = Pipe(
            redis,
            use="registry",
            scripts=("roster",),
            timeout_seconds=timeout_seconds,
            greet=self._on_connect,
            lost=self._on_lost,
        )
        self._nudged = asyncio.Event()
        self._was_lost = False
        self._keep_until = 0.0
        self._records: dict[str, WorkerRecord] = {}

    @property
    def records(self) -> Mapping[str, WorkerRecord]:
        """What is known, by worker id."""
        return self._records

    async def watch(self, changed: Callable[[Mapping[str, WorkerRecord]], None]) -> None:
        """Call `changed` with all records each time they differ from before, until cancelled.

        While Redis is away, and for one lease after it came back, no record is dropped.

        Raises:
            RedisUnsuitable: inside a group, when the server can never be used.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pipe.run())
            tasks.create_task(
                listen(
                    self._redis,
                    self._keys.nudges,
                    heard=lambda _: self._nudged.set(),
                    gap=self._nudged.set,
                    quiet_seconds=self._lease_seconds / 3,
                )
            )
            tasks.create_task(self._poll(changed))

    async def _poll(self, changed: Callable[[Mapping[str, WorkerRecord]], None]) -> None:
        while True:
            self._nudged.clear()
            await self._pipe.until_ready()
            try:
                answer = await self._pipe.script("roster", (self._keys.roster,), self._keys.prefix)
            except QueueUnavailable:
                answer = None
            if answer is not None and self._learn(answer):
                changed(dict(self._records))
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._nudged.wait()
            except TimeoutError:
                pass

    def _learn(self, answer: list[bytes]) -> bool:
        """Take over what Redis knows; True when that is news."""
        records: dict[str, WorkerRecord] = {}
        for encoded in answer:
            try:
                record = msgspec.msgpack.decode(encoded, type=WorkerRecord)
            except msgspec.DecodeError as error:
                log.warning("worker.unreadable", cause=str(error))
                continue
            records[record.id] = record
        if asyncio.get_running_loop().time() < self._keep_until:
            records = {**self._records, **records}
        if records == self._records:
            return False
        self._records = records
        return True

    async def _on_connect(self) -> None:
        if self._was_lost:
            self._keep_until = asyncio.get_running_loop().time() + self._lease_seconds
        self._nudged.set()

    def _on_lost(self) -> None:
        self._was_lost = True
