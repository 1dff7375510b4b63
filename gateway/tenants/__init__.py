"""Whose key a client shows, and on which terms that tenant is served.

This package knows keys, tenants and where Redis keeps them. It does not know HTTP, and the queue
knows of it no more than `Terms`. Start with `keyring.py`; `store.py` is what `baton keys` changes.
"""

from gateway.tenants.keyring import Keyring
from gateway.tenants.records import ANYONE, KeyRecord, Tenant
from gateway.tenants.store import KeyStore, NoSuchKey

__all__ = ["ANYONE", "KeyRecord", "KeyStore", "Keyring", "NoSuchKey", "Tenant"]
