"""What is left to a tenant, as the queue says and clients are told."""

from __future__ import annotations

import msgspec


class Allowance(msgspec.Struct, frozen=True):
    """Of `limit` a minute, `remaining` are left; in `reset_seconds` it is all there again."""

    limit: int
    remaining: int
    reset_seconds: float


class Quota(msgspec.Struct, frozen=True):
    """The tenant's allowances; None where there is no limit. Prefill and decode are in tokens."""

    requests: Allowance | None = None
    prefill: Allowance | None = None
    decode: Allowance | None = None

    @property
    def tokens(self) -> Allowance | None:
        """That of the two kinds of tokens of which the smaller part is left."""
        known = [one for one in (self.prefill, self.decode) if one is not None]
        return min(known, key=lambda one: one.remaining / one.limit, default=None)
