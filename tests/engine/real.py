"""The small engine with a model behind it: its tokens follow from logits and parameters."""

from __future__ import annotations

from typing import Any

from backends.emulation import EmulationBackend
from tests.engine.small import SmallEngine


class RealEngine(SmallEngine):
    """Computes with torch, in float32, on one thread."""

    def __init__(self, *, model: str, pool_tokens: int = 1024, **options: Any) -> None:
        super().__init__(
            kernel=EmulationBackend(
                model=model,
                dtype="float32",
                threads=1,
                pool_tokens=pool_tokens,
                context_tokens=options.pop("context_tokens", 512),
                max_batch=32,
            ),
            **options,
        )
