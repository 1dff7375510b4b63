"""The forward pass of Llama, Qwen2 and Qwen3 over a paged pool, for a planned batch.

Weights are loaded once, fused where several matrices share an input (Q, K and V; gate and up),
and multiplied with the gains of the norm before them. A small step costs as much for calling
operators as for computing: whatever the layers share (buffers, views, masks) is made once per
step, in `attention.py`, and a layer is a short list of calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from backends.checkpoint.rope import repaired
from backends.checkpoint.spec import Checkpoint, ModelSpec, Pairing, expected_tensors
from backends.emulation.attention import Attention, Scratch
from backends.emulation.linear import Linear
from backends.emulation.plan import Plan
from backends.emulation.pool import PagedPool
from backends.emulation.rope import Rope
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

    def take(self, name: str, gains: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor in the engine's dtype, on its device, in its RoPE pairing.

        Its columns are multiplied with `gains`, in float32.
        """
        tensor = self._exact(name)
        if gains is not None:
            tensor = tensor * gains
        return tensor.to(self._device, self._dtype)

    def fused(self, names: list[str], gains: torch.Tensor | None = None) -> torch.Tensor:
        """Several tensors, stacked by rows."""
        return torch.cat([self.take(name, gains) for name in names])

    def gains(self, name: str) -> torch.Tensor:
        """What a norm's weights make of vectors of length 1: float32, on the CPU."""
        weight = self._exact(name)
        return weight * math.sqrt(len(weight))

    def _exact(self, name: str) -> torch.Tensor:
        tensor = self._checkpoint.tensor(name)
        if tensor.shape != self._shapes[name]:
            raise BackendMisconfigured(
                f"model: tensor {name} has shape {tensor.shape}, not {self._shapes[name]}"
            )
        kind = name.split(".")[-2]
        heads = {"attn_q": self.spec.heads, "attn_k": self.spec.kv_heads}.get(kind, 1)
        if kind in ("attn_q", "attn_k", "attn_q_norm", "attn_k_norm"):
            tensor = repaired(tensor, heads, self.spec.pairing, self._pairing)
        self._done += 1
        self._loaded(self._done / len(self._shapes))
        return torch.from_numpy(tensor)


class Layer:
    """The weights of one layer."""

    def __init__(self, weights: Weights, number: int) -> None:
        spec, block = weights.spec, f"blk.{number}"
        names = [f"{block}.attn_{part}" for part in "qkv"]
        self.qkv = Linear(
            weights.fused(
                [f"{name}.weight" for name in names], weights.gains(f"{block}.attn_norm.weight")
            ),
            weights.fused([f"{name}.bias" for name in names]) if spec.qkv_bias else None,
        )
        self.q_norm = weights.take(f"{block}.attn_q_norm.weight").float() if spec.qk_norm else None
        self.k_norm = weights.take(f"{block}.attn_k_norm.weight").float() if spec.qk_norm else None
        self.output = Linear(
            weights.take(f"{block}.attn_output.weight"),
            weights.take(f"{block}.attn_output.bias") if spec.output_bias else None,
        )
        self.gate_up = Linear(
            weights.fused(
                [f"{block}.ffn_gate.weight", f"{block}.ffn_up.weight"],
                weights.gains(f"{block}.ffn_norm.weight"),
            )
        )
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
        shortest = math.sqrt(self.spec.hidden * self.spec.norm_epsilon)
        self._shortest = torch.tensor(shortest, device=self._embedding.device)
        self._scratch = Scratch()

    def forward(self, plan: Plan, pool: PagedPool, written: Written) -> torch.Tensor:
        """Compute the plan, writing KV into `pool`.

        Returns the normalised hidden states of `plan.wanted`, [wanted, hidden].
        """
        states = functional.embedding(plan.tokens, self._embedding)
        attention = Attention(self.spec, self._rope, plan, pool, states.dtype, self._scratch)
        for number, layer in enumerate(self._layers):
            attention.take(number, layer.qkv(self._unit(states)), layer.q_norm, layer.k_norm)
            written(number)
            last = number == len(self._layers) - 1
            if last and plan.wanted is not None and not plan.wanted.numel():
                return states[:0]
            mixed = attention.mix(number)
            if last and plan.wanted is not None:
                mixed, states = mixed[plan.wanted], states[plan.wanted]
            states = self._rest(layer, states, mixed)
        return functional.rms_norm(states, self._norm.shape, self._norm, self.spec.norm_epsilon)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The next token's logits, float32, for states that `forward` returned."""
        return self._head(states).float()

    def _unit(self, states: torch.Tensor) -> torch.Tensor:
        """Vectors of length 1: the root mean square norm, whose factors are in the weights."""
        exact = states.float()
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).hypot_(self._shortest)
        return exact.div(length).to(states.dtype)

    def _rest(self, layer: Layer, states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        states = layer.output(mixed, states)
        width, gate_up = self.spec.feed_forward, layer.gate_up(self._unit(states))
        gated = functional.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
        return layer.down(gated, states)
