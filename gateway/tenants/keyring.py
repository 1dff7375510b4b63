"""What a gateway knows of API keys: those of its configuration, and those in Redis.

It asks once a second whether anything has changed, so that a revoked key is refused everywhere
within seconds. What was learnt outlives an outage of Redis.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeVar

import msgspec
import structlog
from redis.asyncio import Redis

from gateway.admission.pipe import Pipe
from gateway.admission.scripts import Keys
from gateway.errors import QueueUnavailable, Unauthorized
from gateway.tenants.records import ANYONE, KeyRecord, Tenant, digest_of

log = structlog.get_logger()

POLL_SECONDS = 1.0
NEVER = "never"
T = TypeVar("T")


class Keyring:
    """Knows what is configured; learns the rest while `watch` runs.

    `configured` has the tenant of each key. `trusting`: as long as there is no key at all, none is
    asked for. `elsewhere`: there may be keys in Redis, which have to be learned first.
    """

    def __init__(
        self, configured: Mapping[str, str], *, trusting: bool, elsewhere: bool = True
    ) -> None:
        self._configured = {digest_of(key): tenant for key, tenant in configured.items()}
        self._trusting = trusting
        self._version = NEVER if elsewhere else ""
        self._learned: dict[str, KeyRecord] = {}
        self._tenants: dict[str, Tenant] = {}
        self._asked = asyncio.Event()

    @property
    def asks(self) -> bool:
        """Whether a key must be shown. Until Redis has been asked, one must."""
        return not self._trusting or bool(self._configured or self._learned) or not self.known

    @property
    def known(self) -> bool:
        """Whether Redis has been asked."""
        return self._version != NEVER

    async def until_known(self) -> None:
        """Return once Redis has been asked."""
        await self._asked.wait()

    def tenant_of(self, key: str) -> Tenant:
        """Whose key it is; empty for none shown.

        Raises:
            Unauthorized: nobody's.
            QueueUnavailable: Redis has not answered yet, and it may be one of those there.
        """
        if not self.asks:
            return self._tenants.get(ANYONE) or Tenant(name=ANYONE)
        digest = digest_of(key)  # looked up by digest: the time it takes tells nothing of the keys
        name = self._configured.get(digest)
        record = self._learned.get(digest)
        name = record.tenant if name is None and record is not None else name
        if name is not None:
            return self._tenants.get(name) or Tenant(name=name)
        if not self.known:
            raise QueueUnavailable("Redis does not answer, and the API keys are there")
        raise Unauthorized("a valid API key is needed: `Authorization: Bearer KEY`")

    async def watch(self, redis: Redis, deployment: str, *, timeout_seconds: float = 2.0) -> None:
        """Follow what Redis says, until cancelled.

        Raises:
            RedisUnsuitable: inside a group, when the server can never be used.
        """
        pipe = Pipe(redis, use="keys", scripts=("keys",), timeout_seconds=timeout_seconds)
        names = Keys(deployment).api_keys
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pipe.run())
            while True:
                await pipe.until_ready()
                try:
                    self._learn(await pipe.script("keys", names, self._version))
                except QueueUnavailable as error:
                    log.debug("keys.unread", cause=str(error))
                await asyncio.sleep(POLL_SECONDS)

    def _learn(self, answer: list[bytes | list[bytes]]) -> None:
        version, *news = answer
        if news:
            self._learned = _decoded(news[0], KeyRecord)
            self._tenants = _decoded(news[1], Tenant)
            log.info("keys.learned", count=len(self._learned))
        if isinstance(version, bytes):
            self._version = version.decode()
        self._asked.set()


def _decoded(flat: bytes | list[bytes], kind: type[T]) -> dict[str, T]:
    """Names and what they stand for, without what cannot be read."""
    found: dict[str, T] = {}
    for name, value in zip(flat[::2], flat[1::2], strict=True):
        if isinstance(name, bytes) and isinstance(value, bytes):
            try:
                found[name.decode()] = msgspec.msgpack.decode(value, type=kind)
            except msgspec.DecodeError as error:
                log.warning("keys.unreadable", name=name.decode()[:12], cause=str(error))
    return found
