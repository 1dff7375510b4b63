"""The options of the llama.cpp backend, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from backends.checkpoint.checks import MOST, blocks_of, check_pool, check_whole, converted
from backends.errors import BackendMisconfigured

SEQUENCES = 256
"""As many as llama.cpp has."""

SPARE = 9
"""Sequences beyond a batch: prompts between two of their chunks, and the scratch one."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `LlamaCppBackend`."""

    model: str
    weights: Literal["stored", "float32"] = "stored"
    kv_dtype: Literal["float32", "float16"] = "float16"
    threads: int | None = None
    pool_tokens: int | None = None
    pool_blocks: int | None = None
    block_tokens: int = 16
    context_tokens: int | None = None
    max_batch: int = 64
    cache_dir: str = ""

    @property
    def blocks(self) -> int:
        """Blocks in the pool, from whichever of the two options was given."""
        return blocks_of(self.pool_tokens, self.pool_blocks, self.block_tokens)

    @property
    def cpus(self) -> int:
        """Threads that compute: as told, else as numeric libraries are, else one for each CPU."""
        told = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(told) if told.isdigit() else 0) or len(os.sched_getaffinity(0))

    @property
    def path(self) -> Path:
        """The model's file."""
        return Path(self.model).expanduser()


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of the backend.

    Raises:
        BackendMisconfigured: names the first option that is wrong, and says how.
    """
    options = converted(values, Options)
    for name, most in (MOST | {"max_batch": SEQUENCES - SPARE}).items():
        check_whole(name, getattr(options, name, None), most)
    check_pool(options.pool_tokens, options.pool_blocks)
    if not (options.path.is_file() and options.path.suffix == ".gguf"):
        raise BackendMisconfigured(f"model: llama.cpp reads .gguf files; {options.model!r} is none")
    return options
