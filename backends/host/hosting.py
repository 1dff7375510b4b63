"""Choose the loop that runs a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from backends.api import Backend, EngineBackend, SteppedBackend
from backends.host.config import HostConfig
from backends.host.engine import EngineLoop
from backends.host.ledger import Ledger
from backends.host.loop import Loop, Outcome
from backends.host.reuse import Reuse
from backends.host.steps import StepLoop
from backends.protocol import RequestSpec


def loop_of(
    config: HostConfig,
    backend: Backend,
    ledger: Ledger,
    reuse: Reuse,
    outcome: Outcome,
    limit: Callable[[RequestSpec], int],
) -> Loop:
    """What runs a backend of its kind. `limit` says how many tokens a request may generate."""
    if backend.info.kind == "engine":
        return EngineLoop(
            cast("EngineBackend", backend),
            ledger,
            outcome,
            answer_seconds=config.step_timeout_seconds,
            limit=limit,
        )
    return StepLoop(
        cast("SteppedBackend", backend),
        ledger,
        reuse,
        outcome,
        step_tokens=config.step_tokens,
        step_timeout=config.step_timeout_seconds,
    )
