"""What the HTTP side is given by whoever starts it: a carrier, the model's text, limits."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from gateway.errors import Forbidden, ModelNotFound, Unauthorized
from gateway.life.job import Carrier, Timeline
from gateway.resume import Records
from gateway.tenants import Keyring, Tenant
from gateway.tenants.records import digest_of
from gateway.text import Vocabulary

SALT_BYTES = 16


class Observe(Protocol):
    """Told once of every request that was answered, refused or given up (status 499)."""

    def __call__(
        self,
        route: str,
        status: int,
        timeline: Timeline | None,
        prompt_tokens: int,
        completion_tokens: int,
        seconds_to_first_token: float | None,
        total: float,
    ) -> None:
        """`route` is a path of the API, or `unknown`; times are seconds since the arrival.

        Of a request with several prompts the timeline is that of the one which ended first.
        """


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything behind the routes; `build_app` makes an application of it.

    `models` are the names under which the one model is asked for, the first its own. `ready`
    says why a request would not be answered now, or None. `keyring` knows whose key it is that a
    client shows; `admin_keys` open what shows all tenants' work.
    `keep_alive_seconds` is how long a stream waits for its first token before its headers go
    out all the same, and how often it shows a sign of life from then on: before, a failure is a
    plain status; afterwards it is an event in the stream.
    `request` says what became of the request with that id, or None when it is not known.
    `first_token_seconds`, plus as many for each 1,000 tokens of the prompt, and `gap_seconds`
    are what a request is placed for; 0: no limit.
    `records` has the requests that may be asked for again; with `every_stream` each stream is one.
    `share_prefixes`: KV that was computed for one tenant serves others as well.
    """

    carrier: Carrier
    text: Vocabulary
    models: tuple[str, ...]
    ready: Callable[[], str | None]
    ledger: Callable[[], Awaitable[Any]]
    workers: Callable[[], Any]
    drain: Callable[[str], Awaitable[None]]
    request: Callable[[str], Any]
    registry: CollectorRegistry
    observe: Observe
    keyring: Keyring = field(repr=False)
    admin_keys: frozenset[str] = field(default=frozenset(), repr=False)
    records: Records | None = None
    every_stream: bool = False
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_seconds: float = 30.0
    request_timeout_seconds: float = 600.0
    keep_alive_seconds: float = 10.0
    slow_client_seconds: float = 60.0
    ledger_seconds: float = 5.0
    max_n: int = 16
    max_choices: int = 128
    expected_output_tokens: int = 256
    first_token_seconds: float = 0.0
    first_token_seconds_per_1000: float = 0.0
    gap_seconds: float = 0.0
    share_prefixes: bool = False
    version: str = ""
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """The model's own name."""
        return self.models[0]

    def tenant(self, authorization: str) -> Tenant:
        """Whose key the `Authorization` header shows.

        Raises:
            Unauthorized: nobody's.
            QueueUnavailable: it cannot be told before Redis answers.
        """
        return self.keyring.tenant_of(_bearer(authorization))

    @cached_property
    def _admins(self) -> frozenset[str]:
        return frozenset(map(digest_of, self.admin_keys))

    def check_admin(self, authorization: str) -> None:
        """Refuse what shows all tenants' work to whoever has no key for it.

        Raises:
            Unauthorized: the header shows no key of any kind.
            Forbidden: the key is a tenant's, or none is configured although tenants have theirs.
        """
        if not (self.admin_keys or self.keyring.asks):
            return
        key = _bearer(authorization)
        if not key:
            raise Unauthorized("an administrator's key is needed: `Authorization: Bearer KEY`")
        if digest_of(key) not in self._admins:
            self.tenant(authorization)
            raise Forbidden("this page needs a key of `gateway.admin_keys`")

    def salt(self, tenant: str, cache_salt: str) -> bytes:
        """What keeps the KV of this tenant, or of this salt of its own, apart from others'."""
        whose = b"" if self.share_prefixes else tenant.encode(errors="surrogateescape")
        parts = struct.pack(">I", len(whose)) + whose + cache_salt.encode(errors="surrogatepass")
        return hashlib.blake2b(parts, digest_size=SALT_BYTES, person=b"baton salt").digest()

    def first_token_by(self, arrived: float, prompt_tokens: int) -> float:
        """When the first token must be there; `inf` when nothing is said of it."""
        if not self.first_token_seconds:
            return inf
        more = self.first_token_seconds_per_1000 * prompt_tokens / 1000
        return arrived + self.first_token_seconds + more

    def check_model(self, model: str | None) -> None:
        """Refuse a model that is not served here; none at all means the one that is.

        Raises:
            ModelNotFound: says which one is.
        """
        if model is not None and model not in self.models:
            message = f"the model `{model[:128]}` is not served here; `{self.model}` is"
            raise ModelNotFound(message, field="model")


def _bearer(authorization: str) -> str:
    """The key that the header shows; empty when it shows none."""
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
