"""The pools of a backend, whether it has one or one for each tensor-parallel shard."""

from __future__ import annotations

from typing import NamedTuple

from backends.api import BackendInfo
from transfer.contract import Buffer
from transfer.layout import KVLayout


class KVPool(NamedTuple):
    """One pool: how it is cut, and its memory."""

    layout: KVLayout
    memory: Buffer


def pools_of(info: BackendInfo, pool: Buffer) -> tuple[KVPool, ...]:
    """All pools of a backend that states `info` and offers `pool`.

    Raises:
        ValueError: it offers another number of them than it states.
    """
    memory = tuple(pool) if info.shards else (pool,)
    if len(memory) != len(info.layouts):
        raise ValueError(f"pool: {len(memory)} of them for {len(info.shards)} shards")
    return tuple(map(KVPool, info.layouts, memory))
