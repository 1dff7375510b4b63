"""What is compared: how requests wait, whom a gateway turns away, what placement knows."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from tests.bench.placement.orders import Fair, Queue, Request, Sorted

THRESHOLDS = (4_000, 8_000, 16_000, 32_000)
"""Prompt tokens per prefill worker, among which the busy threshold may choose its best."""


def _arrival(request: Request) -> float:
    return request.arrived


def _due(request: Request) -> float:
    return request.due


@dataclass(frozen=True)
class Policy:
    """How requests wait, whom the gateway turns away, and whether placement knows the targets.

    A request whose first token is overdue leaves every queue. Beyond `most_tokens` of backlog per
    prefill worker new ones are turned away.
    """

    name: str
    order: str = "arrival"
    most_tokens: float = inf
    targets: bool = False
    tenants: int = 1

    def queue(self) -> Queue:
        """An empty one."""
        if self.order == "fair":
            return Fair(_due)
        return Sorted(_due if self.order == "due" else _arrival)


BUSY = tuple(Policy(f"busy threshold {most}", most_tokens=most) for most in THRESHOLDS)
PEERS = (Policy("first come, first served"), Policy("earliest deadline first", order="due"))
BATON = Policy("Baton", order="fair", targets=True)
SHARED = Policy("Baton, 3 tenants", order="fair", targets=True, tenants=3)
