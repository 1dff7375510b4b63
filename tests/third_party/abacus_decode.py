"""A Llama decoder in numpy, as a stepped backend of Baton. The whole plug-in is this file.

Its pool is its own: token after token, each with all of its layers, and RoPE pairs side by side.
Whoever prefills need not know: Baton converts.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np

from backends.api import (
    BackendInfo,
    BackendMisconfigured,
    KVLayout,
    Output,
    Ready,
    Row,
    StepFailed,
    allocate,
)
from backends.checkpoint.opening import check_model_path, open_checkpoint
from backends.checkpoint.rope import inverse_frequencies, repaired
from backends.rows import Limits, check_rows
from backends.sampling import HONOURED, choose, logprob_of

AXES = "block token layer kv head dim"


class AbacusBackend:
    """Llama from a GGUF file or a Hugging Face folder, in float32."""

    def __init__(
        self,
        *,
        model: str,
        pool_tokens: int = 16384,
        block_tokens: int = 16,
        context_tokens: int = 2048,
        max_batch: int = 64,
    ) -> None:
        checkpoint = open_checkpoint(check_model_path(model))
        spec = self._spec = checkpoint.spec
        if spec.family != "llama" or spec.qkv_bias or spec.output_bias:
            raise BackendMisconfigured("model: only Llama models without biases")
        self._weights = {name: self._read(checkpoint, name) for name in sorted(checkpoint.names())}
        layout = KVLayout(
            model=checkpoint.identity,  # equal for every engine that reads this checkpoint
            weights="float32",
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype="float32",
            block_tokens=block_tokens,
            rope="interleaved",
            axes=AXES,
        )
        checkpoint.close()
        blocks = pool_tokens // block_tokens
        context = min(context_tokens, spec.context_tokens, blocks * block_tokens)
        self.info = BackendInfo(
            layout=layout,
            pool_blocks=blocks,
            vocabulary=spec.vocabulary,
            context_tokens=context,
            end_tokens=spec.end_tokens,
            rng="positional",
            continuation="equivalent",
            sampling=HONOURED,
            max_batch=max_batch,
        )
        self.pool = allocate(layout.block_bytes * blocks)
        self._kv = self.pool.view(np.float32).reshape(list(layout.sizes(blocks).values()))
        self._limits = Limits(spec.vocabulary, context, blocks, block_tokens)
        turns = np.outer(np.arange(context), inverse_frequencies(spec))
        self._cos, self._sin = np.cos(turns, dtype=np.float32), np.sin(turns, dtype=np.float32)

    def _read(self, checkpoint, name: str) -> np.ndarray:
        """A weight, its rows in the order that makes RoPE pairs lie side by side."""
        weight, spec = checkpoint.tensor(name), self._spec
        heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}.get(name.split(".")[-2])
        if heads is not None:
            weight = repaired(weight, heads, spec.pairing, "interleaved")
        return np.ascontiguousarray(weight, np.float32)

    # ---- the contract

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        check_rows(batch, self._limits)
        return [
            self._row(row, lambda layer, number=number: ready(number, layer))
            for number, row in enumerate(batch)
        ]

    def ingest(self, blocks: Items[int]) -> None:
        """Nothing to do: the pool is what is computed from."""

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        for source, target in pairs:
            self._kv[target] = self._kv[source]

    def close(self) -> None:
        self._weights.clear()

    # ---- the model

    def _row(self, row: Row, final: Callable[[int], None]) -> Output:
        states = self._forward(row, final)
        sampled = ()
        if row.sequences:
            logits = self._logits(states[-1])
            if not np.isfinite(logits).all():
                raise StepFailed("the model gave logits that are not numbers")
            sampled = tuple(choose(logits, it, self.info.end_tokens) for it in row.sequences)
        if row.prompt_logprobs is None:
            return Output(sampled)
        following = zip(states, row.following, strict=False)
        wanted = row.prompt_logprobs
        return Output(
            sampled,
            tuple(logprob_of(self._logits(state), token, wanted) for state, token in following),
        )

    def _forward(self, row: Row, final: Callable[[int], None]) -> np.ndarray:
        """The last hidden states of a row, [token, hidden]; its KV is in the pool then."""
        spec, end = self._spec, row.start + len(row.tokens)
        positions = np.arange(row.start, end)
        table = np.array(row.blocks)
        size = self.info.layout.block_tokens
        block, place = table[positions // size], positions % size
        table = table[: self.info.layout.blocks_for(end)]
        states = self._weight("token_embd")[row.tokens]
        for layer in range(spec.layers):
            normal = self._norm(states, f"blk.{layer}.attn_norm")
            q = self._heads(normal, layer, "q", spec.heads, positions)
            k = self._heads(normal, layer, "k", spec.kv_heads, positions)
            v = (normal @ self._weight(f"blk.{layer}.attn_v").T).reshape(k.shape)
            self._kv[block, place, layer, 0], self._kv[block, place, layer, 1] = k, v
            final(layer)
            keys, values = (
                self._kv[table, :, layer].reshape(-1, 2, *k.shape[1:])[:end].swapaxes(0, 1)
            )
            mixed = self._attend(q, keys, values, positions)
            states = states + mixed @ self._weight(f"blk.{layer}.attn_output").T
            normal = self._norm(states, f"blk.{layer}.ffn_norm")
            gate = normal @ self._weight(f"blk.{layer}.ffn_gate").T
            up = normal @ self._weight(f"blk.{layer}.ffn_up").T
            states = (
                states + (gate / (1 + np.exp(-gate)) * up) @ self._weight(f"blk.{layer}.ffn_down").T
            )
        return self._norm(states, "output_norm")

    def _heads(self, states, layer, kind, heads, positions) -> np.ndarray:
        """Q or K of the row, [token, head, dim], turned by RoPE: K is kept turned."""
        found = (states @ self._weight(f"blk.{layer}.attn_{kind}").T).reshape(
            len(states), heads, -1
        )
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        even, odd = found[..., ::2], found[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(found.shape)

    def _attend(self, q, keys, values, positions) -> np.ndarray:
        """Each position looks at itself and what is before it; query heads share KV heads."""
        spec = self._spec
        q = q.reshape(len(q), spec.kv_heads, spec.group, spec.head_dim)
        scores = np.einsum("tkgd,skd->kgts", q, keys) / np.sqrt(np.float32(spec.head_dim))
        scores[:, :, positions[:, None] < np.arange(len(keys))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("kgts,skd->tkgd", weights, values).reshape(len(q), -1)

    def _norm(self, states, name) -> np.ndarray:
        square = np.square(states).mean(-1, keepdims=True)
        return states / np.sqrt(square + np.float32(self._spec.norm_epsilon)) * self._weight(name)

    def _logits(self, state) -> np.ndarray:
        return self._weight("token_embd" if self._spec.tied else "output") @ state

    def _weight(self, name) -> np.ndarray:
        return self._weights[f"{name}.weight"]
