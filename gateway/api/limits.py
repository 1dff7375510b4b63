"""What a client is told of its tenant's limits, and what it says of its own patience."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gateway.errors import BadRequest
from gateway.quota import Quota

TIMEOUT_HEADER = "x-request-timeout-ms"
LONGEST_TIMEOUT_MS = 86_400_000


def quota_headers(quota: Quota) -> dict[str, str]:
    """`x-ratelimit-*`, as OpenAI has them; nothing of what has no limit."""
    headers = {}
    for kind, allowance in (("requests", quota.requests), ("tokens", quota.tokens)):
        if allowance is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(allowance.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(allowance.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = duration(allowance.reset_seconds)
    return headers


def duration(seconds: float) -> str:
    """A time as Go writes it: `12ms`, `7.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    whole = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{whole}s" if minutes else f"{whole}s"


def timeout_of(headers: Mapping[str, str], longest: float) -> float:
    """In how many seconds the client wants its whole answer; no more than `longest`.

    Raises:
        BadRequest: the header is no such number.
    """
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return longest
    if not (given.isascii() and given.isdecimal() and 0 < int(given[:12]) <= LONGEST_TIMEOUT_MS):
        message = f"expected milliseconds, from 1 to {LONGEST_TIMEOUT_MS}"
        raise BadRequest(f"`{TIMEOUT_HEADER}`: {message}", field=TIMEOUT_HEADER)
    return min(int(given) / 1000, longest)
