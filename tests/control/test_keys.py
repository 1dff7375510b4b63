"""API keys: who makes them, where they are, and how soon a revoked one is refused."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from gateway.admission import Terms, open_redis
from gateway.config import RedisSection
from gateway.errors import QueueUnavailable, Unauthorized
from gateway.settings import ConfigError, load
from gateway.tenants import Keyring, KeyStore, NoSuchKey
from gateway.tenants.door import require_keys
from tests.support.patience import PATIENCE_SECONDS

from .conftest import LiveServer
from .queueing import until

BATON = (sys.executable, "-m", "gateway.cli")


@asynccontextmanager
async def watched(redis: Redis, **configured: str) -> AsyncIterator[Keyring]:
    keyring = Keyring(configured, trusting=True)
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(keyring.watch(redis, "test"))
        await until(lambda: keyring.known)
        yield keyring
        watching.cancel()


def refused(keyring: Keyring, key: str) -> bool:
    try:
        keyring.tenant_of(key)
    except Unauthorized:
        return True
    return False


async def test_a_key_is_known_and_then_refused_by_every_gateway_within_seconds(
    redis: Redis,
) -> None:
    store = KeyStore(redis, "test")
    async with watched(redis) as one, watched(redis) as two:
        assert not one.asks
        terms = {"weight": 3.0, "requests": 60, "priority": 2}
        key_id, key = await store.add("ann", terms)
        await until(lambda: one.asks and two.asks)
        tenant = two.tenant_of(key)
        assert (tenant.name, tenant.priority) == ("ann", 2)
        assert tenant.terms == Terms(weight=3.0, requests=60)
        assert refused(one, key[:-1])
        assert refused(one, "")
        assert await store.revoke(key_id) == "ann"
        await until(lambda: not one.asks and not two.asks)


async def test_only_digests_are_stored(redis: Redis) -> None:
    store = KeyStore(redis, "test")
    key_id, key = await store.add("ann", {})
    for name in await redis.keys("*"):
        kind = await redis.type(name)
        content = await (redis.hgetall(name) if kind == b"hash" else redis.get(name))
        assert key not in str(content)
        assert key.removeprefix("sk-baton-")[:16] not in str(content)
    await store.revoke(key_id)


async def test_terms_belong_to_the_tenant_and_go_with_its_last_key(redis: Redis) -> None:
    store = KeyStore(redis, "test")
    first, _ = await store.add("ann", {"weight": 3.0})
    second, _ = await store.add("ann", {"requests": 5})
    assert (await store.tenants())["ann"].terms == Terms(weight=3.0, requests=5)
    await store.revoke(first)
    assert "ann" in await store.tenants()
    await store.revoke(second)
    assert await store.tenants() == {}
    with pytest.raises(NoSuchKey):
        await store.revoke(second)


async def test_keys_of_the_configuration_go_on_working_and_take_their_tenant_s_terms(
    redis: Redis,
) -> None:
    store = KeyStore(redis, "test")
    key_id, key = await store.add("ann", {"weight": 2.0})
    async with watched(redis, configured_key="ann", other_key="bob") as keyring:
        assert keyring.tenant_of("configured_key").terms.weight == 2.0
        assert keyring.tenant_of(key).name == "ann"
        assert keyring.tenant_of("other_key").terms == Terms()
        await store.revoke(key_id)
        await until(lambda: refused(keyring, key))
        assert keyring.tenant_of("configured_key").name == "ann"


async def test_before_redis_has_answered_nobody_comes_in_unknown() -> None:
    keyring = Keyring({"k": "ann"}, trusting=True)
    assert keyring.asks
    assert keyring.tenant_of("k").name == "ann"
    for key in ("", "other"):
        with pytest.raises(QueueUnavailable):
            keyring.tenant_of(key)


async def test_a_gateway_that_others_reach_never_opens_when_the_last_key_goes(
    redis: Redis,
) -> None:
    keyring = Keyring({}, trusting=False, elsewhere=False)
    assert keyring.asks
    assert refused(keyring, "")


async def test_without_a_key_nobody_listens_beyond_loopback(redis: Redis) -> None:
    outside = {"BATON__GATEWAY__HOST": "0.0.0.0", "BATON__DEPLOYMENT": "test"}
    config = load(environ=outside)
    with pytest.raises(ConfigError, match=r"^gateway\.host: 0\.0\.0\.0"):
        await require_keys(config, redis)
    store = KeyStore(redis, "test")
    key_id, _ = await store.add("ann", {})
    await require_keys(config, redis)
    await store.revoke(key_id)
    await require_keys(load(environ={**outside, "BATON__GATEWAY__API_KEYS": "k"}), redis)
    await require_keys(load(environ={}), redis)


async def test_a_gateway_that_needs_a_key_waits_for_redis_to_say(mortal_server: LiveServer) -> None:
    config = load(environ={"BATON__GATEWAY__HOST": "0.0.0.0"})
    async with open_redis(RedisSection(url=mortal_server.url)) as redis:
        mortal_server.kill()
        waiting = asyncio.ensure_future(require_keys(config, redis))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await mortal_server.start()
        with pytest.raises(ConfigError):
            await asyncio.wait_for(waiting, PATIENCE_SECONDS)


def baton(*words: str, code: int = 0, **environ: str) -> str:
    answer = subprocess.run(
        [*BATON, *words],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        env={**os.environ, **environ},
    )
    assert answer.returncode == code, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def test_the_command_line_adds_lists_and_revokes(shared_server: LiveServer) -> None:
    address = ("--redis-url", shared_server.url)
    added = baton("keys", "add", "ann", "--weight", "3", "--requests", "60", *address)
    key, key_id = added.split()[0], added.split(" id ")[1].split(".")[0]
    assert key.startswith("sk-baton-")
    listed = baton("keys", "list", *address)
    assert key_id in listed
    assert "60 requests" in listed
    assert key not in listed
    assert "ended" in baton("keys", "revoke", key_id, *address)
    assert key_id not in baton("keys", "list", *address)
    assert "no key" in baton("keys", "revoke", key_id, *address, code=1)
    assert "--weight" in baton("keys", "add", "ann", "--weight", "0", *address, code=2)
    nowhere = "unix:///nowhere/redis.sock"
    assert "redis.url" in baton("keys", "list", "--redis-url", nowhere, code=2)


def test_keys_of_the_embedded_redis_are_made_before_anything_runs() -> None:
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        data = ("--data-dir", folder)
        key_id = baton("keys", "add", "ann", *data).split(" id ")[1].split(".")[0]
        assert key_id in baton("keys", "list", *data)
        assert list(Path(folder, "redis").rglob("*aof*"))


def test_a_gateway_on_every_address_refuses_to_start_without_a_key(
    shared_server: LiveServer,
) -> None:
    said = baton(
        *("gateway", "--host", "0.0.0.0", "--port", "0", "--redis-url", shared_server.url),
        code=2,
        BATON__DEPLOYMENT="nobody",
    )
    assert "gateway.host: 0.0.0.0 is reachable from outside" in said
    checked = baton("check", "--host", "0.0.0.0", "--redis-url", shared_server.url, code=2)
    assert "gateway.host" in checked
