"""The keys and tenants in Redis, as whoever administers them changes and lists them.

Unlike all else there they have no lifetime: a key lasts until it is revoked, a tenant's terms as
long as one of its keys. Each change sets a new version, by which gateways notice it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from redis.asyncio import Redis

from gateway.admission.scripts import Keys
from gateway.tenants.records import ID_CHARACTERS, KeyRecord, Tenant, digest_of, new_key

VERSION_SECONDS = 86_400  # without one, gateways read all keys once more and go on


class NoSuchKey(Exception):
    """No key has that id. The operator's mistake."""


class KeyStore:
    """One deployment's keys and tenants."""

    def __init__(self, redis: Redis, deployment: str) -> None:
        keys = Keys(deployment)
        self._redis = redis
        self._version, self._keys, self._tenants = keys.api_keys

    async def add(self, tenant: str, changes: Mapping[str, Any]) -> tuple[str, str]:
        """A new key of `tenant`, whose terms (and `priority`) change as told; its id and itself.

        Raises:
            RedisError: it was not stored.
        """
        tenants = await self.tenants()
        terms = dict(changes)
        old = tenants.get(tenant) or Tenant(name=tenant)
        priority = terms.pop("priority", old.priority)
        new = Tenant(
            name=tenant, priority=priority, terms=msgspec.structs.replace(old.terms, **terms)
        )
        key = new_key()
        digest = digest_of(key)
        record = KeyRecord(tenant=tenant, created_at=int(time.time()))
        async with self._redis.pipeline(transaction=True) as change:
            change.hset(self._keys, digest, msgspec.msgpack.encode(record))
            change.hset(self._tenants, tenant, msgspec.msgpack.encode(new))
            change.set(self._version, secrets.token_hex(8), ex=VERSION_SECONDS)
            await change.execute()
        return digest[:ID_CHARACTERS], key

    async def keys(self) -> dict[str, KeyRecord]:
        """All keys, by id."""
        return {digest[:ID_CHARACTERS]: record for digest, record in (await self._all()).items()}

    async def tenants(self) -> dict[str, Tenant]:
        """The tenants that have such keys, by name."""
        stored: Any = await self._redis.hgetall(self._tenants)
        decoded = (msgspec.msgpack.decode(value, type=Tenant) for value in stored.values())
        return {tenant.name: tenant for tenant in decoded}

    async def revoke(self, key_id: str) -> str:
        """Forget a key, and its tenant's terms with the last one; returns the tenant.

        Raises:
            NoSuchKey: none has this id.
            RedisError: it may not have been revoked.
        """
        keys = await self._all()
        digest = next((one for one in keys if one[:ID_CHARACTERS] == key_id), None)
        if digest is None:
            raise NoSuchKey(f"there is no key {key_id}")
        tenant = keys.pop(digest).tenant
        async with self._redis.pipeline(transaction=True) as change:
            change.hdel(self._keys, digest)
            if all(record.tenant != tenant for record in keys.values()):
                change.hdel(self._tenants, tenant)
            change.set(self._version, secrets.token_hex(8), ex=VERSION_SECONDS)
            await change.execute()
        return tenant

    async def _all(self) -> dict[str, KeyRecord]:
        stored: Any = await self._redis.hgetall(self._keys)
        return {
            digest.decode(): msgspec.msgpack.decode(value, type=KeyRecord)
            for digest, value in stored.items()
        }
