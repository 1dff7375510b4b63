"""What placement looks at, what it is asked for, and what it answers."""

from __future__ import annotations

import msgspec

from backends.protocol import BackendInfo, Role, Sampling


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one connected worker. `queued_tokens` wait for prefill there."""

    id: str
    role: Role
    info: BackendInfo
    queued_tokens: int
    running: int
    free_blocks: int
    draining: bool = False


class Snapshot(msgspec.Struct, frozen=True):
    """The connected workers, and the pairs of ids that have met and can hand over."""

    workers: tuple[WorkerView, ...]
    pairs: frozenset[tuple[str, str]]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be placed: a prefix of `tokens` tokens for `sequences` sequences.

    `decodes` is false when the first token is all that is wanted.
    """

    tokens: int
    sequences: int
    sampling: Sampling
    decodes: bool = True
    avoid: frozenset[str] = frozenset()


class Placement(msgspec.Struct, frozen=True):
    """Where a prefix goes. `decode` is None when `prefill` does all that is left."""

    prefill: str
    decode: str | None
    reason: str


class Unplaceable(msgspec.Struct, frozen=True):
    """Why nothing can be chosen. `field` is set when the request itself is the reason."""

    reason: str
    field: str | None = None
