"""The forward pass of Llama, Qwen2 and Qwen3 over a paged pool, for a planned batch.

Weights are loaded once, fused where several matrices share an input (Q, K and V; gate and up).
Everything here is a function of the plan and the pool; no row is looked at one by one except
prefill chunks, whose attention is worth a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from backends.emulation.linear import Linear
from backends.emulation.plan import Chunk, DecodeGroup, Plan
from backends.emulation.pool import PagedPool
from backends.emulation.rope import Rope, repaired
from backends.emulation.spec import Checkpoint, ModelSpec, Pairing, expected_tensors
from backends.errors import BackendMisconfigured

Written = Callable[[int], None]
"""Called with a layer's number once its KV is in the pool."""


class Weights:
    """Reads a checkpoint tensor by tensor, checks shapes, and keeps count for a progress bar."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pairing: Pairing,
        dtype: torch.dtype,
        device: str,
        loaded: Callable[[float], None],
    ) -> None:
        self.spec = checkpoint.spec
        self._checkpoint = checkpoint
        self._pairing = pairing
        self._dtype, self._device = dtype, device
        self._shapes = dict(expected_tensors(checkpoint.spec))
        self._done, self._loaded = 0, loaded

    def take(self, name: str) -> torch.Tensor:
        """One tensor in the engine's dtype, on its device, in its RoPE pairing."""
        tensor: torch.Tensor = self._checkpoint.tensor(name)
        if tuple(tensor.shape) != self._shapes[name]:
            raise BackendMisconfigured(
                f"model: tensor {name} has shape {tuple(tensor.shape)}, not {self._shapes[name]}"
            )
        kind = name.split(".")[-2]
        heads = {"attn_q": self.spec.heads, "attn_k": self.spec.kv_heads}.get(kind, 1)
        if kind in ("attn_q", "attn_k", "attn_q_norm", "attn_k_norm"):
            tensor = repaired(tensor, heads, self.spec.pairing, self._pairing)
        self._done += 1
        self._loaded(self._done / len(self._shapes))
        return tensor.to(self._device, self._dtype)

    def fused(self, names: list[str]) -> torch.Tensor:
        """Several tensors, stacked by rows."""
        return torch.cat([self.take(name) for name in names])


class Layer:
    """The weights of one layer."""

    def __init__(self, weights: Weights, number: int) -> None:
        spec, block = weights.spec, f"blk.{number}"
        names = [f"{block}.attn_{part}" for part in "qkv"]
        self.attention_norm = weights.take(f"{block}.attn_norm.weight")
        self.qkv = Linear(
            weights.fused([f"{name}.weight" for name in names]),
            weights.fused([f"{name}.bias" for name in names]) if spec.qkv_bias else None,
        )
        self.q_norm = weights.take(f"{block}.attn_q_norm.weight") if spec.qk_norm else None
        self.k_norm = weights.take(f"{block}.attn_k_norm.weight") if spec.qk_norm else None
        self.output = Linear(
            weights.take(f"{block}.attn_output.weight"),
            weights.take(f"{block}.attn_output.bias") if spec.output_bias else None,
        )
        self.ffn_norm = weights.take(f"{block}.ffn_norm.weight")
        self.gate_up = Linear(weights.fused([f"{block}.ffn_gate.weight", f"{block}.ffn_up.weight"]))
        self.down = Linear(weights.take(f"{block}.ffn_down.weight"))


class Transformer:
    """A model in memory. One thread at a time calls it."""

    def __init__(self, weights: Weights, rope: Rope) -> None:
        self.spec: ModelSpec = weights.spec
        self._rope = rope
        self._embedding = weights.take("token_embd.weight")
        self._layers = [Layer(weights, number) for number in range(self.spec.layers)]
        self._norm = weights.take("output_norm.weight")
        head = self._embedding if self.spec.tied else weights.take("output.weight")
        self._head = Linear(head)
        self._scale = self.spec.head_dim**-0.5
        self._scratch = self._embedding.new_empty(0)

    def forward(self, plan: Plan, pool: PagedPool, written: Written) -> torch.Tensor:
        """Compute the plan, writing KV into `pool`.

        Returns the normalised hidden states of `plan.wanted`, [wanted, hidden].
        """
        if self._scratch.numel() < plan.scratch:
            kind = pool.canonical
            self._scratch = torch.empty(plan.scratch, dtype=kind.dtype, device=kind.device)
        states = functional.embedding(plan.tokens, self._embedding)
        table = self._rope.at(plan.positions)
        for number, layer in enumerate(self._layers):
            heads = self._heads(layer, states, table)
            pool.write(number, plan.cells, heads[:, self.spec.heads :])
            written(number)
            last = number == len(self._layers) - 1
            if last and plan.wanted is not None and not plan.wanted.numel():
                return states[:0]
            mixed = self._attend(number, heads, plan, pool)
            if last and plan.wanted is not None:
                mixed, states = mixed[plan.wanted], states[plan.wanted]
            states = self._rest(layer, states, mixed)
        return self._normed(states, self._norm)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The next token's logits, float32, for states that `forward` returned."""
        return self._head(states).float()

    def _normed(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(states, weight.shape, weight, self.spec.norm_epsilon)

    def _heads(self, layer: Layer, states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Q, K and V heads, [token, head, dim], with Q and K turned."""
        spec = self.spec
        flat = layer.qkv(self._normed(states, layer.attention_norm))
        heads = flat.view(len(states), -1, spec.head_dim)
        turned = spec.heads + spec.kv_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            heads[:, : spec.heads] = self._normed(heads[:, : spec.heads], layer.q_norm)
            heads[:, spec.heads : turned] = self._normed(
                heads[:, spec.heads : turned], layer.k_norm
            )
        self._rope.turn(heads[:, :turned], table)
        return heads

    def _rest(self, layer: Layer, states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        states = layer.output(mixed).add_(states)
        gate, up = layer.gate_up(self._normed(states, layer.ffn_norm)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up)).add_(states)

    def _attend(
        self, number: int, heads: torch.Tensor, plan: Plan, pool: PagedPool
    ) -> torch.Tensor:
        width = self.spec.heads * self.spec.head_dim
        mixed = heads.new_empty(len(heads), width)
        for group in plan.groups:
            mixed[group.start : group.end] = self._decode(number, heads, group, pool)
        for chunk in plan.chunks:
            mixed[chunk.start : chunk.end] = self._prefill(number, heads, chunk, pool)
        return mixed

    def _gathered(
        self, number: int, runs: torch.Tensor, rows: int, pool: PagedPool, dtype: torch.dtype
    ) -> torch.Tensor:
        """K and V of `rows` rows from the pool: [K|V, row * kv head, token, dim]."""
        spec = self.spec
        found = pool.gather(number, runs, self._scratch)
        return found.view(2, rows * spec.kv_heads, -1, spec.head_dim).to(dtype)

    def _decode(
        self, number: int, heads: torch.Tensor, group: DecodeGroup, pool: PagedPool
    ) -> torch.Tensor:
        """One query per row, each over its own cache; heads of a group share their K and V."""
        spec, rows = self.spec, group.end - group.start
        keys, values = self._gathered(number, group.runs, rows, pool, heads.dtype)
        queries = heads[group.start : group.end, : spec.heads]
        queries = queries.reshape(rows * spec.kv_heads, spec.group, spec.head_dim)
        scores = torch.baddbmm(group.mask, queries, keys.transpose(1, 2), alpha=self._scale)
        return torch.bmm(scores.softmax(-1), values).view(rows, -1)

    def _prefill(
        self, number: int, heads: torch.Tensor, chunk: Chunk, pool: PagedPool
    ) -> torch.Tensor:
        """Many queries of one row: over itself, or over all of its prefix in the pool."""
        spec = self.spec
        own = heads[chunk.start : chunk.end].transpose(0, 1).unsqueeze(0)
        queries = own[:, : spec.heads]
        if chunk.runs is None:
            # what later chunks will read is rounded to the pool's dtype: attend to the same
            rounded = own[:, spec.heads :].to(pool.canonical.dtype).to(heads.dtype)
            keys, values = rounded.chunk(2, dim=1)
        else:
            keys, values = self._gathered(number, chunk.runs, 1, pool, heads.dtype).unsqueeze(1)
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=chunk.mask,
            is_causal=chunk.runs is None,
            scale=self._scale,
            enable_gqa=spec.group > 1,
        )
        return mixed.squeeze(0).transpose(0, 1).reshape(chunk.end - chunk.start, -1)
