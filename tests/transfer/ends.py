"""Both ends of each transport between processes, made alike."""

import pytest

from transfer.nixl import NixlReceiver, NixlSender, available
from transfer.pool import Pool
from transfer.shm import ShmReceiver, ShmSender
from transfer.tcp import TcpReceiver, TcpSender

TRANSPORTS = [
    "tcp",
    "shm",
    pytest.param("nixl", marks=pytest.mark.skipif(not available(), reason="needs NIXL")),
]


def receiver_of(transport, layout, blocks, pool, **options):
    """A receiver into `pool`, which must have come from `allocate`."""
    if transport == "tcp":
        return TcpReceiver(layout, **options)
    if transport == "shm":
        return ShmReceiver(layout, blocks, pool, **options)
    return NixlReceiver(layout, pool=Pool.of(layout, blocks, pool), **options)


def sender_of(transport, **options):
    return {"tcp": TcpSender, "shm": ShmSender, "nixl": NixlSender}[transport](**options)
