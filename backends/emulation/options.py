"""The options of the emulation backend, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from backends.checkpoint.checks import (
    DEFAULT_AXES,
    MOST,
    blocks_of,
    check_axes,
    check_pool,
    check_whole,
    converted,
)
from backends.errors import BackendMisconfigured


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `EmulationBackend`."""

    model: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    pool_tokens: int | None = None
    pool_blocks: int | None = None
    block_tokens: int = 16
    axes: str = DEFAULT_AXES
    context_tokens: int | None = None
    rope: Literal["auto", "half", "interleaved"] = "auto"
    max_batch: int = 256
    shards: int = 1
    profile: str | None = None
    model_shape: str | None = None
    weights: str = "bfloat16"
    devices: int = 1
    slower: float = 1.0

    @property
    def blocks(self) -> int:
        """Blocks in the pool, from whichever of the two options was given."""
        return blocks_of(self.pool_tokens, self.pool_blocks, self.block_tokens)


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of a backend.

    Raises:
        BackendMisconfigured: names the first option that is wrong, and says how.
    """
    options = converted(values, Options)
    for name, most in MOST.items():
        check_whole(name, getattr(options, name), most)
    check_axes(options.axes)
    if options.shards > 1 and options.device != "cpu":
        raise BackendMisconfigured("shards: only where device is cpu")
    check_pool(options.pool_tokens, options.pool_blocks)
    return options
