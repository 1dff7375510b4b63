"""How Redis is reached: the client, what a server must be able to do, and listening to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from gateway.config import RedisSection
from gateway.redis_url import Sentinels, sentinels_of

log = structlog.get_logger()

OLDEST = (6, 2)


class RedisUnsuitable(Exception):
    """The server cannot be used: too old, or a cluster. The operator's fault; never retried."""


def open_redis(section: RedisSection, url: str = "") -> Redis:
    """A client for `url`, or else for `redis.url`; connects when it is used, and never retries.

    Where sentinels are named, each connection goes to whatever they call the primary just then.

    Raises:
        ValueError: the address is none.
    """
    url = url or section.url
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": None,  # each user of the client has a deadline of its own
        "socket_connect_timeout": section.connect_timeout_seconds,
        "retry": Retry(NoBackoff(), 0),
    }
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    sentinels = sentinels_of(url)
    if sentinels is None:
        return Redis.from_url(url, **options)
    return _follow(sentinels, options)


class _Following(Redis):
    """Of the primary that sentinels name; their connections are closed with it."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        await pool.sentinel_manager.aclose()


def _follow(sentinels: Sentinels, options: dict[str, Any]) -> Redis:
    asking = {
        **options,
        # one that does not answer must not keep us from asking the others
        "socket_timeout": options["socket_connect_timeout"],
        "password": sentinels.sentinel_password,
        "ssl": sentinels.tls,
    }
    manager: Any = Sentinel(sentinels.addresses, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    client: Redis = manager.master_for(
        sentinels.name,
        redis_class=_Following,
        db=sentinels.database,
        username=sentinels.username,
        password=sentinels.password,
        ssl=sentinels.tls,
        **options,
    )
    return client


def check_server(info: bytes) -> str:
    """Refuse what `INFO server` shows to be unsuitable; returns the name of this run of it.

    Raises:
        RedisUnsuitable: it is older than 6.2, or runs as a cluster.
    """
    lines = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    facts = {name: value.strip() for name, _, value in lines}
    version = facts.get("redis_version", "")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST:
        raise RedisUnsuitable(f"Redis 6.2 or later is needed; this server is {version or '?'}")
    if facts.get("redis_mode") == "cluster":
        raise RedisUnsuitable("this server is part of a Redis Cluster, which is not supported")
    return facts.get("run_id", "")


async def listen(
    redis: Redis,
    channel: str,
    *,
    heard: Callable[[bytes], None],
    gap: Callable[[], None],
    quiet_seconds: float,
) -> None:
    """Call `heard` with each message on `channel`, until cancelled.

    `gap` is called each time the server says that the subscription has begun, anew after a lost
    connection too: messages before that were missed. A connection that says nothing is asked
    after `quiet_seconds`.
    """
    while True:
        try:
            async with redis.pubsub() as subscription:
                await subscription.subscribe(channel)
                await _hear(subscription, heard, gap, quiet_seconds)
        except (RedisError, OSError) as error:
            log.debug("redis.lost", channel=channel, cause=str(error))
        await asyncio.sleep(min(0.25, quiet_seconds))


async def _hear(
    subscription: Any,
    heard: Callable[[bytes], None],
    gap: Callable[[], None],
    quiet_seconds: float,
) -> None:
    asked = False
    while True:
        message = await subscription.get_message(timeout=quiet_seconds)
        if message is not None:
            asked = False
            if message["type"] == "message":
                heard(message["data"])
            elif message["type"] == "subscribe":
                gap()
        elif asked:
            raise RedisConnectionError("no answer on a subscription")
        else:
            asked = True
            await subscription.ping()
