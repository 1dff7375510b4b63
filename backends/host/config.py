"""What a worker must be told."""

from __future__ import annotations

from typing import Literal

import msgspec

from backends.protocol import VERSION, Role
from transfer.tls import Credentials

Transport = Literal["auto", "shm", "nixl", "tcp"]
Wire = Literal["int8", "float8_e4m3"]


class HostConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's settings.

    `listen` is the control address, `unix:/path` or `tcp:host:port`; `data_host` the address on
    which KV arrives; both are over TLS where `tls` is given. `protocol` is the newest version that
    it speaks with gateways. `step_tokens` bounds the prompt tokens of one step; `max_waiting` the
    prefills that wait for memory or their turn. A landing is freed `lease_seconds` after it was
    granted or last written to. What is not done `drain_seconds` after the order to drain is given
    back. A step that lasts `step_timeout_seconds`, or an engine that owes an answer for so long,
    ends the process. `landing_share` is the part of the pool that may wait in landings,
    `quarantine_share` the part that landings of one prefill worker may hold, withdrawn ones
    included, before it gets no more. `transports` are offered and
    used, `auto` standing for all that are there; `socket_dir` is a folder of this user alone for
    their sockets (empty: one is made). In the codes of `wire`, which are lossy, KV may travel to
    and from workers that have them too, where that is faster (see `transfer.coding`). With
    `unlike_weights` KV may go to and come from workers whose weights have another precision, and
    none is kept unless `reuse` is on. `faults` damages handoffs on purpose, for drills (see
    `transfer.faults`). `reuse` says whether KV is kept for later prefixes: `auto`, where that
    changes no text (see `reuse.py`). Requests
    that are kept for nobody go on for `orphan_run_seconds`; beyond `max_orphans` of them, or
    `max_orphan_tokens` generated tokens, the oldest are given up.
    """

    id: str
    role: Role
    listen: str
    data_host: str = "127.0.0.1"
    secret: str = ""
    tls: Credentials | None = None
    protocol: int = VERSION
    lease_seconds: float = 60.0
    drain_seconds: float = 10.0
    step_tokens: int = 2048
    max_waiting: int = 1024
    step_timeout_seconds: float = 120.0
    commit_timeout_seconds: float = 30.0
    landing_share: float = 0.8
    quarantine_share: float = 0.5
    transports: tuple[Transport, ...] = ("auto",)
    wire: tuple[Wire, ...] = ()
    unlike_weights: bool = False
    socket_dir: str = ""
    faults: str = ""
    reuse: Literal["auto", "on", "off"] = "auto"
    orphan_run_seconds: float = 10.0
    max_orphans: int = 1024
    max_orphan_tokens: int = 1 << 20

    @property
    def keeping(self) -> Literal["auto", "on", "off"]:
        """`reuse`; but what engines of unlike precision computed is not the same by itself."""
        return "off" if self.reuse == "auto" and self.unlike_weights else self.reuse
