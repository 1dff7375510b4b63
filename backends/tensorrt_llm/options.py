"""The options of the backend, checked before the library is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from backends.checkpoint.checks import MOST, blocks_of, check_pool, check_whole, converted
from backends.errors import BackendMisconfigured

OURS = frozenset(
    {
        *("model", "backend", "attn_backend", "tensor_parallel_size", "cuda_graph_config"),
        *("enable_chunked_prefill", "max_num_tokens", "max_seq_len"),
        *("max_beam_width", "max_batch_size", "skip_tokenizer_init", "dtype", "kv_cache_config"),
        *("kv_connector_config", "cache_transceiver_config", "scheduler_config"),
    }
)
"""Arguments of `tensorrt_llm.LLM` that this backend sets: the operator may not."""

OURS_OF_CACHE = frozenset(
    {"tokens_per_block", "enable_block_reuse", "enable_partial_reuse", "dtype"}
)

ALONE: Mapping[str, Mapping[str, Any]] = {
    "llm": {
        "pipeline_parallel_size": 1,
        "context_parallel_size": 1,
        "enable_attention_dp": False,
        "speculative_config": None,
    },
    "kv_cache": {"host_cache_size": 0, "max_attention_window": None},
}
"""With other values the blocks that a connector is told of are not all of a prompt's KV. Some
releases start with them all the same."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `TensorRTLLM`."""

    model: str
    tensor_parallel: int = 1
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    kv_dtype: Literal["auto", "fp8"] = "auto"
    block_tokens: int = 32
    pool_tokens: int | None = None
    pool_blocks: int | None = None
    context_tokens: int | None = None
    max_batch: int = 64
    chunk_tokens: int = 8192
    identity: str = ""
    weights: str = ""
    lease_seconds: float = 60.0
    llm: dict[str, Any] = {}
    kv_cache: dict[str, Any] = {}

    @property
    def blocks(self) -> int:
        """Blocks of the arena."""
        return blocks_of(self.pool_tokens, self.pool_blocks, self.block_tokens)


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of the backend.

    Raises:
        BackendMisconfigured: names the first option that is wrong, and says how.
    """
    options = converted(values, Options)
    for name in ("pool_tokens", "pool_blocks", "block_tokens", "context_tokens", "max_batch"):
        check_whole(name, getattr(options, name), MOST[name])
    check_whole("tensor_parallel", options.tensor_parallel, 256)
    check_whole("chunk_tokens", options.chunk_tokens, 1 << 20, least=options.block_tokens)
    check_pool(options.pool_tokens, options.pool_blocks)
    if not 0 < options.lease_seconds <= 86400:
        raise BackendMisconfigured("lease_seconds must be above 0 and at most 86400")
    for name, taken in (("llm", OURS), ("kv_cache", OURS_OF_CACHE)):
        both = sorted(taken & getattr(options, name).keys())
        if both:
            raise BackendMisconfigured(f"{name}.{both[0]} is set by this backend")
        for key, only in ALONE[name].items():
            if getattr(options, name).get(key) not in (None, only):
                raise BackendMisconfigured(
                    f"{name}.{key}: KV is exported from one pool in GPU memory, with all of a"
                    " rank's heads in all layers"
                )
    return options
