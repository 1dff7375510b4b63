"""What is kept of keys and tenants. A key itself is kept nowhere: its digest stands for it."""

from __future__ import annotations

import hashlib
import secrets

import msgspec

from gateway.admission.ticket import Terms

ANYONE = "default"
PREFIX = "sk-baton-"
ID_CHARACTERS = 12


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks. `priority` is that of requests which do not say theirs."""

    name: str
    priority: int = 0
    terms: Terms = Terms()


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Whose key it is. `created_at` is in seconds since 1970."""

    tenant: str
    created_at: int


def new_key() -> str:
    """A key that nobody guesses: 256 bits, so that its plain digest tells nothing of it."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What stands for a key, wherever it is kept: SHA-256, in hexadecimal."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
