"""The options of the vLLM backend, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from backends.checkpoint.checks import (
    DEFAULT_POOL_TOKENS,
    MOST,
    blocks_of,
    check_pool,
    check_whole,
    converted,
)

MOST_TOKENS = 1 << 32


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `VllmBackend`."""

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    threads: int | None = None
    pool_tokens: int | None = None
    pool_blocks: int | None = None
    block_tokens: int = 32
    cache_tokens: int = DEFAULT_POOL_TOKENS
    context_tokens: int | None = None
    max_batch: int = 64
    step_tokens: int = 2048
    compile: bool = False
    load_seconds: int = 600

    @property
    def blocks(self) -> int:
        """Blocks in the arena, from whichever of the two options was given."""
        return blocks_of(self.pool_tokens, self.pool_blocks, self.block_tokens)


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of a backend.

    Raises:
        BackendMisconfigured: names the first option that is wrong, and says how.
    """
    options = converted(values, Options)
    bounds = MOST | {"cache_tokens": MOST_TOKENS, "step_tokens": 1 << 20, "load_seconds": 1 << 16}
    for name in Options.__struct_fields__:
        if name in bounds:
            check_whole(name, getattr(options, name), bounds[name])
    check_pool(options.pool_tokens, options.pool_blocks)
    return options
