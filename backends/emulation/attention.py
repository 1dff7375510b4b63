"""Attention of one step's tokens over the paged pool.

Everything that is the same in all layers is prepared once: the buffers for heads, and for each
decode group and prefill chunk the views of its queries, keys, values and result.
"""

from __future__ import annotations

import msgspec
import torch
from torch.nn import functional

from backends.checkpoint.spec import ModelSpec
from backends.emulation.plan import Chunk, DecodeGroup, Plan
from backends.emulation.pool import PagedPool
from backends.emulation.rope import Rope


class Scratch:
    """Flat memory that grows to what the largest step needed; one tensor per dtype."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, torch.Tensor] = {}

    def take(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Uninitialised numbers. The next call for this dtype gives the same memory again."""
        numbers, held = shape[0] * shape[1], self._held.get(dtype)
        if held is None or held.numel() < numbers:
            held = self._held[dtype] = torch.empty(numbers, dtype=dtype, device=device)
        return held[:numbers].view(shape)


class Prefix(msgspec.Struct, frozen=True):
    """What to read from the pool: `runs`, into `read`, and from there to `cast`.

    The two are the same memory where the pool has the dtype of the computation.
    """

    runs: torch.Tensor
    read: torch.Tensor
    cast: torch.Tensor


class Part(msgspec.Struct, frozen=True):
    """One call of attention, over a prefix in the pool or (without one) causal over itself.

    Queries, keys, values and result are [row, head, token, dim]; the mask is broadcast to
    [row, head, token, token of the prefix].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    result: torch.Tensor
    prefix: Prefix | None = None
    mask: torch.Tensor | None = None


class Attention:
    """Turns heads, stores K and V, and mixes values, for the tokens of one plan."""

    def __init__(
        self,
        spec: ModelSpec,
        rope: Rope,
        plan: Plan,
        pool: PagedPool,
        dtype: torch.dtype,
        scratch: Scratch,
    ) -> None:
        self._spec, self._plan, self._pool, self._scratch = spec, plan, pool, scratch
        self._dtype, self._device = dtype, plan.tokens.device
        self._scale = spec.head_dim**-0.5
        count = len(plan.tokens)
        turned = spec.heads + spec.kv_heads
        shape = (turned + spec.kv_heads, count, spec.head_dim)
        self._exact = torch.empty(shape, device=self._device)
        self._heads = self._exact
        if dtype != torch.float32:
            self._heads = torch.empty(shape, dtype=dtype, device=self._device)
        self._by_token = self._exact.transpose(0, 1)
        self._q, self._k = self._exact[: spec.heads], self._exact[spec.heads : turned]
        self._kv = self._heads[spec.heads :]
        self._turn = rope.turning(self._exact[:turned], plan.positions)
        self._mixed = torch.empty(
            count, spec.heads, spec.head_dim, dtype=dtype, device=self._device
        )
        self._flat = self._mixed.flatten(1)
        self._parts = [*map(self._group, plan.groups), *map(self._chunk, plan.chunks)]

    def take(
        self,
        layer: int,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
    ) -> None:
        """Turn the heads in `qkv`, [token, head * dim], and store K and V in the pool."""
        self._by_token.copy_(qkv.view(self._by_token.shape))
        for heads, norm in ((self._q, q_norm), (self._k, k_norm)):
            if norm is not None:
                epsilon = self._spec.norm_epsilon
                heads.copy_(functional.rms_norm(heads, norm.shape, norm, epsilon))
        self._turn()
        if self._heads is not self._exact:
            self._heads.copy_(self._exact)
        stored = self._kv.to(self._pool.dtype)
        if self._pool.dtype != self._dtype:
            self._kv.copy_(stored)  # what later chunks will read: attend to the same
        self._pool.write(layer, self._plan.cells, stored)

    def mix(self, layer: int) -> torch.Tensor:
        """What every token's heads make of the values, [token, head * dim]."""
        for part in self._parts:
            if part.prefix is not None:
                self._read(layer, part.prefix)
            found = functional.scaled_dot_product_attention(
                part.queries,
                part.keys,
                part.values,
                attn_mask=part.mask,
                is_causal=part.prefix is None,
                scale=self._scale,
                enable_gqa=part.queries.shape[1] > part.keys.shape[1],
            )
            part.result.copy_(found)
        return self._flat

    def _group(self, group: DecodeGroup) -> Part:
        """One query per row, each over its own cache; heads that share K and V are its tokens."""
        spec, rows = self._spec, group.end - group.start
        queries = self._heads[: spec.heads, group.start : group.end]
        result = self._mixed[group.start : group.end]
        return self._over_pool(
            group.runs,
            rows,
            queries=queries.view(spec.kv_heads, spec.group, rows, -1).permute(2, 0, 1, 3),
            result=result.view(rows, spec.kv_heads, spec.group, -1),
            mask=group.mask,
        )

    def _chunk(self, chunk: Chunk) -> Part:
        """Many queries of one row: over itself, or over all of its prefix in the pool."""
        queries = self._heads[: self._spec.heads, chunk.start : chunk.end].unsqueeze(0)
        result = self._mixed[chunk.start : chunk.end].transpose(0, 1).unsqueeze(0)
        if chunk.runs is None:
            keys, values = self._kv[:, chunk.start : chunk.end].unsqueeze(0).chunk(2, dim=1)
            return Part(queries, keys, values, result)
        return self._over_pool(chunk.runs, 1, queries=queries, result=result, mask=chunk.mask)

    def _over_pool(
        self,
        runs: torch.Tensor,
        rows: int,
        *,
        queries: torch.Tensor,
        result: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Part:
        shape = (runs.numel(), self._pool.run_numbers)
        read = self._scratch.take(shape, self._pool.dtype, self._device)
        cast = self._scratch.take(shape, self._dtype, self._device)
        keys, values = cast.view(2, rows, self._spec.kv_heads, -1, self._spec.head_dim)
        return Part(queries, keys, values, result, Prefix(runs, read, cast), mask)

    def _read(self, layer: int, prefix: Prefix) -> None:
        self._pool.gather(layer, prefix.runs, prefix.read)
        if self._pool.dtype != self._dtype:
            prefix.cast.copy_(prefix.read)
