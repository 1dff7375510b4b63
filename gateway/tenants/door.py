"""Nobody listens beyond this machine without a key."""

from __future__ import annotations

import asyncio

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.config import Config
from gateway.settings import ConfigError, Problem, api_keys, is_loopback
from gateway.tenants.store import KeyStore

log = structlog.get_logger()

ASK_AGAIN_SECONDS = 0.5


async def missing_keys(config: Config, redis: Redis) -> Problem | None:
    """What is wrong when others reach the gateway and no key is configured, nor in Redis.

    Raises:
        RedisError, OSError, TimeoutError: Redis does not say.
    """
    host = config.gateway.host
    if is_loopback(host) or api_keys(config):
        return None
    async with asyncio.timeout(config.redis.timeout_seconds):
        if await KeyStore(redis, config.deployment).keys():
            return None
    message = (
        f"{host} is reachable from outside, and no API key would be asked for: make one with"
        " `baton keys add`, or set gateway.api_keys or gateway.api_keys_file"
    )
    return Problem("gateway.host", "", message)


async def require_keys(config: Config, redis: Redis) -> None:
    """Return once it is known that nobody comes in without a key; waits for Redis if it must.

    Raises:
        ConfigError: everybody would.
    """
    waiting = False
    while True:
        try:
            problem = await missing_keys(config, redis)
        except (RedisError, OSError, TimeoutError) as error:
            if not waiting:
                log.warning("keys.awaited", cause=str(error))
            waiting = True
            await asyncio.sleep(ASK_AGAIN_SECONDS)
            continue
        if problem is not None:
            raise ConfigError(problem)
        return
