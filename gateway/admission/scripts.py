"""The Lua scripts: where they are, what keys they touch, and how they are told apart."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Literal

import msgspec

ScriptName = Literal[
    "enqueue", "leave", "requeue", "renew", "publish", "withdraw", "roster", "keys", "record"
]
ALONE: tuple[ScriptName, ...] = ("roster", "keys", "record")
SCRIPTS: tuple[ScriptName, ...] = (
    *("enqueue", "leave", "requeue", "renew", "publish", "withdraw"),
    *ALONE,
)
SHARED = ("book", "order", "credit", "quota", "grant")


class Script(msgspec.Struct, frozen=True):
    """A script's text, and the digest by which the server knows it."""

    source: str
    digest: str


@cache
def script(name: ScriptName) -> Script:
    """The script of that name, preceded by what all scripts of the queue share."""
    folder = files("gateway.admission")
    names = (name,) if name in ALONE else (*SHARED, name)
    source = "\n".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in names)
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


class Keys(msgspec.Struct, frozen=True):
    """The names of one deployment in Redis; its hash tag keeps them in one slot.

    Scripts derive further names from the prefix: a Redis Cluster is refused.
    """

    deployment: str

    @property
    def prefix(self) -> str:
        """What every name of this deployment begins with."""
        return f"baton:{{{self.deployment}}}:"

    def room(self, model: str) -> str:
        """The book of one model's queue."""
        return f"{self.prefix}room:{model}"

    @property
    def roster(self) -> str:
        """Ids of the workers, by when their records lapse."""
        return f"{self.prefix}workers"

    def gateway(self, gateway: str) -> str:
        """Exists while that gateway is alive."""
        return f"{self.prefix}gateway:{gateway}"

    def grants(self, gateway: str) -> str:
        """The channel on which that gateway hears of its grants."""
        return f"{self.prefix}grants:{gateway}"

    @property
    def api_keys(self) -> tuple[str, str, str]:
        """The version of the API keys, the keys by digest, and the tenants by name."""
        return f"{self.prefix}keys_version", f"{self.prefix}keys", f"{self.prefix}tenants"

    @property
    def nudges(self) -> str:
        """The channel on which gateways hear that a worker came, went or changed."""
        return f"{self.prefix}nudges"


def lifetime_ms(lease_seconds: float) -> int:
    """How long a key outlives the last one who touched it, in milliseconds."""
    return int(max(60.0, 10 * lease_seconds) * 1000)
