"""The options of the ONNX Runtime backend, checked before anything is loaded."""

from __future__ import annotations

import os
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


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `OnnxRuntimeBackend`."""

    model: str
    weights: Literal["auto", "float32", "q4"] = "auto"
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    threads: int | None = None
    pool_tokens: int | None = None
    pool_blocks: int | None = None
    block_tokens: int = 16
    axes: str = DEFAULT_AXES
    context_tokens: int | None = None
    rope: Literal["auto", "half", "interleaved"] = "auto"
    max_batch: int = 256

    @property
    def blocks(self) -> int:
        """Blocks in the pool, from whichever of the two options was given."""
        return blocks_of(self.pool_tokens, self.pool_blocks, self.block_tokens)

    @property
    def cpus(self) -> int:
        """Threads that compute: as told, else as numeric libraries are, else one for each CPU."""
        told = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(told) if told.isdigit() else 0) or len(os.sched_getaffinity(0))


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of a backend.

    Raises:
        BackendMisconfigured: names the first option that is wrong, and says how.
    """
    options = converted(values, Options)
    for name, most in MOST.items():
        if hasattr(options, name):
            check_whole(name, getattr(options, name), most)
    check_axes(options.axes)
    check_pool(options.pool_tokens, options.pool_blocks)
    return options
