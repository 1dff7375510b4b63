"""Who moves bytes, by name: a module with a `Sender` and a `Receiver`, and what it needs."""

from __future__ import annotations

from typing import Any

import msgspec


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """One way to move the bytes.

    `options` go to both halves, `needs` says how to get it. `spins`: its threads use their cores
    also while nothing is asked of them, so that it must be stopped while others are measured.
    """

    module: str
    options: dict[str, Any] = {}
    environment: dict[str, str] = {}
    needs: str = ""
    spins: bool = False


NIXL = "pip install nixl-cu12"
NOT_OVER_TCP = {"UCX_TLS": "shm,self"}

CONTENDERS: dict[str, Contender] = {
    "bare socket": Contender(module="bare"),
    "bare socket, polled": Contender(module="bare", options={"polled": True}),
    "memcpy": Contender(module="copies"),
    "read": Contender(module="copies", options={"read": True}),
    "numpy": Contender(module="permutations", options={"by": "numpy"}),
    "torch": Contender(module="permutations", options={"by": "torch"}),
    "Baton, conversion": Contender(module="permutations", options={"by": "baton"}),
    "NIXL over TCP": Contender(
        module="nixl_halves",
        options={"progress": True},
        environment={"UCX_TLS": "tcp,self"},
        needs=NIXL,
        spins=True,
    ),
    "NIXL over TCP, polled": Contender(
        module="nixl_halves",
        options={"progress": False},
        environment={"UCX_TLS": "tcp,self"},
        needs=NIXL,
    ),
    "NIXL over shared memory": Contender(
        module="nixl_halves",
        # UCX's shared memory cannot notice a dead peer: NIXL offers it only without that.
        options={"progress": False, "errors": "none"},
        environment=NOT_OVER_TCP,
        needs=NIXL,
    ),
    "Mooncake over TCP": Contender(
        module="mooncake_halves",
        environment={"MC_LOG_LEVEL": "ERROR"},
        needs="pip install mooncake-transfer-engine-non-cuda; apt install libibverbs1",
    ),
    "Baton tcp": Contender(module="baton_halves", options={"transport": "tcp"}),
    "Baton tcp, no digest": Contender(
        module="baton_halves", options={"transport": "tcp", "digest": False}
    ),
    "Baton shm": Contender(module="baton_halves", options={"transport": "shm"}),
    "Baton shm, no digest": Contender(
        module="baton_halves", options={"transport": "shm", "digest": False}
    ),
    "Baton nixl": Contender(module="baton_halves", options={"transport": "nixl"}, needs=NIXL),
    "Baton nixl, no digest": Contender(
        module="baton_halves", options={"transport": "nixl", "digest": False}, needs=NIXL
    ),
}
