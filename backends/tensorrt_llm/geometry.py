"""From what the ranks have registered to the layout that other workers are told.

What the tensor says and what `config.json` says must agree; what is not known is refused with the
reason, for bytes in an order that nobody knows are no KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec

from backends.checkpoint.spec import ModelSpec
from backends.errors import BackendMisconfigured
from backends.tensorrt_llm.messages import Geometry
from transfer.layout import DType, KVLayout, Shard

AXES = "block layer kv head token dim"
"""What the attention backend TRTLLM writes; FLASHINFER has tokens before heads."""

DTYPES: dict[str, DType] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3",
}
RAW = ("bits8", "uint8", "int8")
"""How older releases call the dtype of a float8 pool."""


def measured(tensor: Any, llm_args: Any) -> Geometry:
    """What a rank has registered, in words. Raises as `_check`."""
    mapping = llm_args.parallel_config.to_mapping()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype in ("bits8", "uint8") and str(llm_args.kv_cache_config.dtype) == "fp8":
        dtype = "float8_e4m3fn"
    _check(tensor, dtype)
    shape = cast("tuple[int, int, int, int]", tuple(tensor.shape))
    return Geometry(
        rank=mapping.rank,
        world=mapping.world_size,
        shape=shape,
        dtype=dtype,
        block_tokens=llm_args.kv_cache_config.tokens_per_block,
        attention=str(llm_args.attn_backend),
    )


def _check(tensor: Any, dtype: str) -> None:
    """Refuse a pool that is none of those we can read.

    Raises:
        BackendMisconfigured: says why.
    """
    if tensor.dim() != 4 or not tensor.is_contiguous():
        raise BackendMisconfigured(
            f"the engine's pool has the shape {tuple(tensor.shape)}; known is one contiguous tensor"
            " [blocks, layers, K and V, heads * tokens * dim]"
        )
    if tensor.shape[2] != 2:
        raise BackendMisconfigured(
            f"the engine's pool has {tensor.shape[2]} planes, K and V are two: latents (MLA) are"
            " not exported"
        )
    if dtype == "int8":
        raise BackendMisconfigured("the engine's pool is packed (nvfp4): its scales are elsewhere")
    if dtype not in DTYPES:
        raise BackendMisconfigured(
            f"the engine's pool is of {dtype}; known are {', '.join(DTYPES)}"
        )


def layout_of(
    geometries: Sequence[Geometry], spec: ModelSpec, *, model: str, weights: str
) -> tuple[KVLayout, tuple[Shard, ...]]:
    """The layout of all heads, and the heads of each rank that exports (see `exporting_ranks`).

    Raises:
        BackendMisconfigured: tensors and model contradict each other; names both numbers.
    """
    first, *others = geometries
    for other in others:
        if msgspec.structs.replace(other, rank=first.rank, shape=first.shape) != first:
            raise BackendMisconfigured(f"ranks differ: {first} and {other}")
        if other.shape[1:] != first.shape[1:]:
            raise BackendMisconfigured(f"ranks differ: {first.shape} and {other.shape}")
    if first.attention != "TRTLLM":
        raise BackendMisconfigured(
            f"attn_backend is {first.attention}: only of TRTLLM the order inside a block is known"
        )
    if len(geometries) != first.world:
        raise BackendMisconfigured(f"{len(geometries)} of {first.world} ranks have a pool")
    _, layers, _, row = first.shape
    if layers != spec.layers:
        raise BackendMisconfigured(
            f"the engine's pool has {layers} layers, config.json says {spec.layers}"
        )
    heads = heads_of_rank(0, first.world, spec.kv_heads).count
    expected = heads * first.block_tokens * spec.head_dim
    if row != expected:
        raise BackendMisconfigured(
            f"the engine's pool has {row} numbers in a layer of a block; {heads} heads of"
            f" {spec.head_dim} for {first.block_tokens} tokens are {expected}"
        )
    layout = KVLayout(
        model=model,
        weights=weights,
        layers=layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=DTYPES[first.dtype],
        block_tokens=first.block_tokens,
        rope="half",
        axes=AXES,
    )
    if first.world == 1:
        return layout, ()
    ranks = exporting_ranks(first.world, spec.kv_heads)
    return layout, tuple(heads_of_rank(rank, first.world, spec.kv_heads) for rank in ranks)


def heads_of_rank(rank: int, world: int, kv_heads: int) -> Shard:
    """The heads that a rank has. Where there are fewer than ranks, several have the same one.

    Raises:
        BackendMisconfigured: they cannot be shared out evenly.
    """
    if max(world, kv_heads) % min(world, kv_heads):
        raise BackendMisconfigured(
            f"tensor_parallel: {kv_heads} heads cannot be shared out to {world} ranks"
        )
    if world <= kv_heads:
        each = kv_heads // world
        return Shard(rank * each, each)
    return Shard(rank // (world // kv_heads), 1)


def exporting_ranks(world: int, kv_heads: int) -> tuple[int, ...]:
    """The ranks that export: one for each share of the heads, in the heads' order."""
    return tuple(range(0, world, max(1, world // kv_heads)))
