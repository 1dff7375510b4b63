"""Baton's transports by name, made as a worker makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.layout import KVLayout
from transfer.nixl import NixlReceiver, NixlSender
from transfer.pool import Pool
from transfer.shm import ShmReceiver, ShmSender
from transfer.tcp import TcpReceiver, TcpSender


def receiver_of(transport: str, layout: KVLayout, pool: NDArray[np.uint8], *, digest: bool) -> Any:
    """A receiver that is not started yet."""
    if transport == "tcp":
        return TcpReceiver(layout, digest=digest)
    if transport == "shm":
        return ShmReceiver(layout, len(pool) // layout.block_bytes, pool, digest=digest)
    if transport == "nixl":
        blocks = len(pool) // layout.block_bytes
        return NixlReceiver(layout, pool=Pool.of(layout, blocks, pool), digest=digest)
    raise ValueError(f"transport: {transport!r}")


def sender_of(transport: str, pool: NDArray[np.uint8]) -> Any:
    """The sender that reaches it."""
    if transport == "tcp":
        return TcpSender()
    if transport == "shm":
        return ShmSender()
    if transport == "nixl":
        return NixlSender()
    raise ValueError(f"transport: {transport!r}")
