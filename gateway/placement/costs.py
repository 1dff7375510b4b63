"""How long a worker or a link takes, as formulas whose numbers are learnt (`estimates.py`).

Seconds, tokens and bytes. `known` is false until enough has been measured to refuse a request
because of it.
"""

from __future__ import annotations

import msgspec

STEP_TOKENS = 512


class PrefillCost(msgspec.Struct, frozen=True):
    """Prefilling n tokens takes `base + linear * n + square * n * n` on an idle worker."""

    base: float = 0.005
    linear: float = 1e-4
    square: float = 0.0
    known: bool = False

    def seconds(self, tokens: int, cached: int = 0) -> float:
        """How long the tokens behind the first `cached` ones take."""
        fresh = tokens - cached
        return self.base + self.linear * fresh + self.square * (tokens + cached) * fresh


class StepCost(msgspec.Struct, frozen=True):
    """A decode step takes `base + row * sequences + context * tokens that they look back on`."""

    base: float = 0.02
    row: float = 1e-4
    context: float = 1e-7
    known: bool = False

    def seconds(self, sequences: int, context: int) -> float:
        """How long one step of so many sequences takes."""
        return self.base + self.row * sequences + self.context * context


class LinkCost(msgspec.Struct, frozen=True):
    """What a handoff adds between prefill and decode: `base + byte * bytes`."""

    base: float = 0.002
    byte: float = 1e-10
    known: bool = False

    def seconds(self, count: int) -> float:
        """How long the first decode step waits for so many bytes."""
        return self.base + self.byte * count
