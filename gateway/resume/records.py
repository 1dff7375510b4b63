"""The records in Redis: opened in the round trip of the enqueue, taken over, settled, dropped.

An owner is named by gateway and epoch; what a former one writes is refused. Redis may forget: it
is told again when it is back, and the epochs that count are those which the workers have seen.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, Self

import msgspec
import structlog
from redis.asyncio import Redis

from gateway.admission.pipe import Pipe
from gateway.admission.scripts import Keys
from gateway.config import Config
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    KeyReused,
    QueueFull,
    QueueUnavailable,
    Repeated,
    RequestUnknown,
    TakenOver,
)
from gateway.resume.claim import Claim, Release
from gateway.resume.saved import Answer, Saved

log = structlog.get_logger()

NEW, TAKEN, OTHER_BODY, FULL = 1, 2, -1, -2
SETTLE_AGAIN_SECONDS = 0.25
MAX_UNSETTLED = 4096
KEY_HEADER, LAST_HEADER = "Idempotency-Key", "Last-Event-ID"

_pack = msgspec.msgpack.encode


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How much of requests that may be asked for again is kept, and for how long.

    Workers keep what nobody owns for `keep_seconds`, Redis the answer for `answer_seconds`.
    """

    keep_seconds: float = 30.0
    answer_seconds: float = 300.0
    max_records: int = 10_000
    max_bytes: int = 8 * 1024 * 1024

    @classmethod
    def of(cls, config: Config) -> Self:
        """As the configuration says."""
        resume = config.resume
        return cls(
            keep_seconds=resume.keep_seconds,
            answer_seconds=resume.answer_seconds,
            max_records=resume.max_records,
            max_bytes=resume.max_bytes,
        )


class _Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the script is asked for; see `record.lua`."""

    op: str
    id: str
    tenant: str = ""
    key: str = ""
    body: str = ""
    epoch: int = 0
    floor: int = 0
    left: int = 0
    lifetime: int = 0
    most: int = 0


class _Errand(msgspec.Struct, frozen=True, kw_only=True):
    """What the script is asked for, and the bytes that it is to keep."""

    wish: _Wish
    saved: bytes = b""
    answer: bytes = b""

    def again(self, **changes: Any) -> _Errand:
        """The same with another wish."""
        return msgspec.structs.replace(self, wish=msgspec.structs.replace(self.wish, **changes))


class Records:
    """The records of one deployment, as one gateway sees them. Works while `run` does."""

    def __init__(
        self,
        redis: Redis,
        deployment: str,
        gateway_id: str,
        retention: Retention,
        *,
        timeout_seconds: float = 2.0,
    ) -> None:
        self.retention = retention
        self._keys = Keys(deployment)
        self._gateway = gateway_id
        self._pipe = Pipe(
            redis,
            use="records",
            scripts=("record",),
            timeout_seconds=timeout_seconds,
            greet=self._tell_again,
        )
        self._tasks = asyncio.TaskGroup()
        self._open: dict[Claim, _Errand] = {}
        self._over: asyncio.Queue[tuple[_Errand, Sequence[Release]]] = asyncio.Queue(MAX_UNSETTLED)

    async def until_available(self) -> None:
        """Return once Redis answers."""
        await self._pipe.until_ready()

    async def run(self) -> None:
        """Keep the connection and settle what is over, until cancelled."""
        async with self._tasks as tasks:
            tasks.create_task(self._pipe.run())
            tasks.create_task(self._settle_forever())

    async def flush(self, seconds: float = 1.0) -> None:
        """Wait until everything that is over is settled, or time is up."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.join()
        except TimeoutError:
            log.warning("record.abandoned", count=self._over.qsize())

    def open(self, tenant: str, key: str, saved: Saved, *, seconds: float) -> Claim:
        """Enter a request that must be answered within `seconds`.

        The record is on its way when this returns; `Claim.secured` says what became of it.

        Raises:
            BodyTooLarge: it is larger than records may be.
            QueueUnavailable: Redis does not answer.
        """
        packed = _pack(saved)
        if len(packed) > self.retention.max_bytes:
            raise BodyTooLarge(
                f"a request with `{KEY_HEADER}` may have {self.retention.max_bytes} bytes, its"
                f" token ids included; this one has {len(packed)}"
            )
        self._check_ready()
        claim = Claim(self, saved, epoch=1, left=seconds, resumed=False)
        left = int(seconds * 1000)
        wish = _Wish(
            op="open",
            id=saved.id,
            tenant=tenant,
            key=_key_digest(tenant, key),
            body=digest(saved),
            left=left,
            lifetime=left + int(self.retention.keep_seconds * 1000),
            most=self.retention.max_records,
        )
        errand = self._open[claim] = _Errand(wish=wish, saved=packed)
        self._tasks.create_task(self._enter(claim, errand))
        return claim

    async def take(self, tenant: str, request: str, *, body: str = "") -> Claim:
        """Take over the request of that id; `body` is the digest of its body, if that was sent.

        Raises:
            RequestUnknown: there is none, or it is another tenant's.
            KeyReused: its body was another one.
            QueueUnavailable: Redis does not answer.
        """
        wish = _Wish(op="take", id=request, tenant=tenant, body=body)
        return self._taken(await self._ask(_Errand(wish=wish)), tenant)

    async def outbid(self, claim: Claim, seen: int) -> int:
        """See `Claim.outbid`; the new epoch."""
        errand = self._open[claim].again(op="again", body="", epoch=claim.epoch, floor=seen)
        state, *rest = await self._ask(errand)
        if state != TAKEN:
            raise TakenOver(claim.id)
        log.warning("record.outbid", request=claim.id, seen=seen)
        return int(rest[1])

    def settle(self, claim: Claim, answer: Answer, releases: Sequence[Release]) -> None:
        """Put the answer into the record, then have the workers let go of it."""
        errand = self._last(claim, "settle", answer=_pack(answer))
        if len(errand.answer) > self.retention.max_bytes or self._over.full():
            for release in releases:  # the workers keep it, for as long as they do
                release(False)
            return
        self._over.put_nowait((errand, releases))

    def drop(self, claim: Claim) -> None:
        """There is nothing to ask for again."""
        if not self._over.full():
            self._over.put_nowait((self._last(claim, "drop"), ()))

    def close(self, claim: Claim) -> None:
        """This gateway is not its owner any more."""
        self._open.pop(claim, None)

    def _last(self, claim: Claim, op: str, *, answer: bytes = b"") -> _Errand:
        lifetime = int(self.retention.answer_seconds * 1000)
        wish = _Wish(op=op, id=claim.id, epoch=claim.epoch, lifetime=lifetime)
        return _Errand(wish=wish, answer=answer)

    def _check_ready(self) -> None:
        if not self._pipe.ready:
            raise QueueUnavailable("Redis does not answer")

    async def _enter(self, claim: Claim, errand: _Errand) -> None:
        try:
            state, *rest = await self._ask(errand)
            if state == NEW:
                claim.opened(None)
            elif state == FULL:
                count = self.retention.max_records
                claim.opened(QueueFull(f"{count} requests with `{KEY_HEADER}` are kept already"))
            else:
                taken = self._taken([state, *rest], errand.wish.tenant)
                claim.opened(Repeated(taken))
                if claim not in self._open:  # nobody waits for it any more
                    self.close(taken)
        except GatewayError as error:
            claim.opened(error)

    def _taken(self, found: Sequence[Any], tenant: str) -> Claim:
        state, *rest = found
        if state == OTHER_BODY:
            raise KeyReused(
                f"`{KEY_HEADER}` was sent before, with another body; use a new one",
                field=KEY_HEADER,
            )
        if state != TAKEN:
            message = "no such request is known; it is over, or was never made with this API key"
            raise RequestUnknown(message, field=LAST_HEADER)
        _, epoch, left, packed, answer = rest
        claim = Claim(
            self,
            msgspec.msgpack.decode(packed, type=Saved),
            epoch=int(epoch),
            left=int(left) / 1000,
            resumed=True,
            answer=msgspec.msgpack.decode(answer, type=Answer) if answer else None,
        )
        wish = _Wish(
            op="take",
            id=claim.id,
            tenant=tenant,
            body=digest(claim.saved),
            left=int(left),
            lifetime=max(1, int(left)) + int(self.retention.keep_seconds * 1000),
            most=self.retention.max_records,
        )
        self._open[claim] = _Errand(wish=wish, saved=packed)
        return claim

    async def _settle_forever(self) -> None:
        while True:
            errand, releases = await self._over.get()
            kept = await self._settled(errand)
            for release in releases:
                release(kept)
            self._over.task_done()

    async def _settled(self, errand: _Errand) -> bool:
        """Whether the record has it; False: it is another gateway's."""
        while True:
            await self._pipe.until_ready()
            try:
                return bool((await self._ask(errand))[0])
            except QueueUnavailable as error:
                log.warning("record.unsettled", request=errand.wish.id, cause=str(error))
                await asyncio.sleep(SETTLE_AGAIN_SECONDS)

    async def _tell_again(self) -> None:
        """First on a new connection: what we own may have been forgotten."""
        for claim, errand in list(self._open.items()):
            left = max(1, int(claim.left * 1000))
            await self._ask(errand.again(op="claim", epoch=claim.epoch, left=left))

    async def _ask(self, errand: _Errand) -> list[Any]:
        index = f"{self._keys.prefix}records"
        packed = _pack(errand.wish)
        words = (self._keys.prefix, self._gateway, packed, errand.saved, errand.answer)
        answer: list[Any] = await self._pipe.ask_script("record", (index,), *words)
        return answer


def digest(saved: Saved) -> str:
    """Names a body sent to an endpoint."""
    return body_digest(saved.route, saved.body)


def body_digest(route: str, body: bytes) -> str:
    """As `digest`."""
    return hashlib.sha256(route.encode() + b"\0" + body).hexdigest()


def _key_digest(tenant: str, key: str) -> str:
    if not key:
        return ""
    parts = _pack((tenant, key.encode(errors="surrogateescape")))
    return hashlib.sha256(parts).hexdigest()
