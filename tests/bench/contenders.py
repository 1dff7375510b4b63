"""What is measured on one model: our engine, its bare matrix products, transformers, llama.cpp.

Each contender gives, for a case, a function that does the work once and can be called again.
Decoding repeats the last position of a context, so that every call costs the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from backends.api import Row, Sampling, Sequence, SteppedBackend
from backends.checkpoint.opening import open_checkpoint
from backends.checkpoint.rope import repaired
from backends.checkpoint.spec import Checkpoint, ModelSpec
from backends.emulation import EmulationBackend
from backends.emulation.linear import Linear

Work = Callable[[], Any]
BLOCK_TOKENS = 16


class Contender(Protocol):
    """One way to compute the model."""

    name: str

    def set_threads(self, threads: int) -> None:
        """Compute on this many threads from now on."""

    def prefill(self, tokens: int) -> Work:
        """Compute a prompt of so many tokens and choose one token."""

    def decode(self, batch: int, context: int) -> Work:
        """Compute one token for each of `batch` sequences that have `context` tokens with it."""


def prompt(tokens: int, vocabulary: int) -> list[int]:
    """Token ids that are spread over the vocabulary."""
    return [(7919 * place + 13) % vocabulary for place in range(tokens)]


class Engine:
    """`EmulationBackend`, by its `step`."""

    name = "engine"

    def __init__(self, model: Path, pool_tokens: int, dtype: str) -> None:
        self.backend: SteppedBackend = EmulationBackend(
            model=str(model), dtype=dtype, pool_tokens=pool_tokens, block_tokens=BLOCK_TOKENS
        )

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def prefill(self, tokens: int) -> Work:
        row = self._row(prompt(tokens, self.backend.info.vocabulary), 0, 0)
        return lambda: self.backend.step([row], _not_pushed)

    def decode(self, batch: int, context: int) -> Work:
        ids = prompt(context, self.backend.info.vocabulary)
        blocks = -(-context // BLOCK_TOKENS)
        self.backend.step([self._row(ids, 0, 0)], _not_pushed)
        self.backend.copy_blocks(
            [(b, copy * blocks + b) for copy in range(1, batch) for b in range(blocks)]
        )
        rows = [self._row(ids[-1:], context - 1, copy * blocks) for copy in range(batch)]
        return lambda: self.backend.step(rows, _not_pushed)

    def _row(self, tokens: list[int], start: int, first_block: int) -> Row:
        count = -(-(start + len(tokens)) // BLOCK_TOKENS)
        greedy = Sampling(temperature=0.0)
        sequence = Sequence(
            prompt=[0] * (start + len(tokens)), generated=[], sampling=greedy, seed=1
        )
        return Row(
            tokens=tokens,
            start=start,
            blocks=list(range(first_block, first_block + count)),
            sequences=(sequence,),
        )


class MatrixProducts:
    """Only the matrix products of the model, on random weights of its shapes, no two shared.

    `prepacked` takes the engine's `Linear`, otherwise `functional.linear`; the better of the two
    is what this machine allows.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, *, prepacked: bool, device: str = "cpu"
    ) -> None:
        self.name = "products, prepacked" if prepacked else "products, plain"
        wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        shapes = [
            (wide + 2 * narrow, spec.hidden),
            (spec.hidden, wide),
            (2 * spec.feed_forward, spec.hidden),
            (spec.hidden, spec.feed_forward),
        ] * spec.layers
        self._dtype = dtype
        self._device = device
        self._layers = [self._product(shape, prepacked=prepacked) for shape in shapes]
        self._inputs = [shape[1] for shape in shapes]
        self._head = self._product((spec.vocabulary, spec.hidden), prepacked=prepacked)
        self._hidden = spec.hidden

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def prefill(self, tokens: int) -> Work:
        return self._work(tokens, 1)

    def decode(self, batch: int, context: int) -> Work:
        del context  # attention is not a product with weights
        return self._work(batch, batch)

    def _work(self, rows: int, sampled: int) -> Work:
        inputs = {width: self._random(rows, width) for width in set(self._inputs)}
        last = self._random(sampled, self._hidden)

        def work() -> None:
            with torch.inference_mode():
                for product, width in zip(self._layers, self._inputs, strict=True):
                    product(inputs[width])
                self._head(last)

        return work

    def _product(
        self, shape: tuple[int, int], *, prepacked: bool
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = self._random(*shape) - 0.5
        if prepacked:
            return Linear(weight)
        return lambda rows: functional.linear(rows, weight)

    def _random(self, rows: int, width: int) -> torch.Tensor:
        return torch.rand(rows, width, device=self._device).to(self._dtype)


class Transformers:
    """`transformers` in float32 on the engine's dequantised weights."""

    name = "transformers"

    def __init__(self, model: Path) -> None:
        self._model = hugging_face_model(model)

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def prefill(self, tokens: int) -> Work:
        ids = torch.tensor([prompt(tokens, self._model.config.vocab_size)])
        mask = torch.ones_like(ids)

        def work() -> int:
            with torch.inference_mode():
                found = self._model(
                    input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1
                )
                return int(found.logits[0, -1].argmax())

        return work

    def decode(self, batch: int, context: int) -> Work:
        ids = torch.tensor([prompt(context, self._model.config.vocab_size)])
        with torch.inference_mode():
            before = torch.ones_like(ids[:, :-1])
            cache = self._model(
                input_ids=ids[:, :-1], attention_mask=before, use_cache=True, logits_to_keep=1
            ).past_key_values
            cache.batch_repeat_interleave(batch)
        last = ids[:, -1:].expand(batch, 1).contiguous()
        mask = torch.ones(batch, context, dtype=ids.dtype)

        def work() -> list[int]:
            with torch.inference_mode():
                found = self._model(
                    input_ids=last, attention_mask=mask, past_key_values=cache, use_cache=True
                )
                cache.crop(-1)
                tokens: list[int] = found.logits[:, -1].argmax(-1).tolist()
                return tokens

        return work


def hugging_face_model(model: Path) -> Any:
    """The checkpoint at `model` as a float32 `transformers` model, Q and K paired by halves."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if model.is_dir():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(model)
    spec = checkpoint.spec
    if spec.family != "llama":
        raise SystemExit(f"{model}: only Llama's GGUF files can be compared with transformers")
    config = LlamaConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.feed_forward,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context_tokens,
        rms_norm_eps=spec.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tied,
    )
    reference = LlamaForCausalLM(config).eval()
    missing, unexpected = reference.load_state_dict(_named_as_there(checkpoint), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{model}: unlike what transformers expects: {missing} {unexpected}")
    reference.tie_weights()
    checkpoint.close()
    return reference


_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _named_as_there(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    spec = checkpoint.spec
    heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}
    tensors = {}
    for name in checkpoint.names():
        parts = name.split(".")
        kind, tensor = parts[-2], checkpoint.tensor(name)
        if kind in heads:
            tensor = repaired(tensor, heads[kind], spec.pairing, "half")
        place = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        tensors[f"{place}{_NAMES[kind]}.{parts[-1]}"] = torch.from_numpy(tensor)
    return tensors


def _not_pushed(row: int, layer: int) -> None:
    """Nobody waits for the layers here."""
