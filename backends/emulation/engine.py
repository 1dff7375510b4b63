"""A Llama-family transformer as a stepped backend, on the CPU or a CUDA device.

Knows rows, blocks and logits; not requests, workers or the network. Start with
`EmulationBackend.step`: `plan.py` lays the batch out, `transformer.py` computes it over
`pool.py`, `sampling.py` chooses tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import partial

import numpy as np
import torch

from backends.api import BackendInfo, Logprob, Output, Ready, Row, Sampled, StepFailed
from backends.checkpoint.checks import (
    DEFAULT_AXES,
    Progress,
    as_dtype,
    check_context,
    check_memory,
)
from backends.checkpoint.opening import check_model_path, open_checkpoint
from backends.checkpoint.spec import Checkpoint, ModelSpec, Pairing
from backends.emulation.linear import bfloat16_is_fast
from backends.emulation.options import Options, read_options
from backends.emulation.pace import Pace
from backends.emulation.plan import Plan, make_plan
from backends.emulation.pool import TORCH_DTYPES, PagedPool
from backends.emulation.profile import Shape
from backends.emulation.rope import Rope
from backends.emulation.timing import Timing, read_timing
from backends.emulation.transformer import Transformer, Weights
from backends.errors import BackendMisconfigured
from backends.rows import Limits, check_rows
from backends.sampling import HONOURED, choose, is_plain_greedy, logprob_of
from transfer.layout import KVLayout, Shard

_LOGPROB_ROWS = 64


class EmulationBackend:
    """Llama, Qwen2 or Qwen3 from a GGUF file or a Hugging Face folder.

    `model` is the path. `dtype` is the precision of weights and arithmetic: "auto" is bfloat16
    where the hardware multiplies it, else float32. `kv_dtype` is the pool's, "auto" the same as
    `dtype`. `threads` are those of torch, and so of the whole process. The pool holds
    `pool_tokens` or `pool_blocks` (one of them; 16,384 tokens unless given) in blocks of
    `block_tokens`, in the order `axes`. `context_tokens` lowers the model's own limit. `rope`
    asks for the other pairing of dimensions than the checkpoint's, to meet a peer that uses it.
    `shards` keeps the KV in so many pools, each with as many of the heads, as a worker on several
    devices has it. With `profile`, steps take as long as on that accelerator, with this model or
    one of `model_shape`, and the pool is no larger than what it has room for; see `timing.py` for
    that and for `weights`, `devices` and `slower`. A step that this machine is too slow for takes
    longer, and that is logged. `progress(phase, fraction)` is called while loading.

    The RoPE pairing is the file's: interleaved for Llama in GGUF (whose Q and K rows are kept
    as they are), half for everything else.

    On `device` "cuda" the pool lives on the device and `pool` is a copy in host memory, brought
    up to date before a layer is reported ready and read in `ingest`. The copying is tested on
    the CPU; on a GPU this code has never run.

    Raises:
        BackendMisconfigured: names the option, or what in the checkpoint is not supported.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        pool_tokens: int | None = None,
        pool_blocks: int | None = None,
        block_tokens: int = 16,
        axes: str = DEFAULT_AXES,
        context_tokens: int | None = None,
        rope: str = "auto",
        max_batch: int = 256,
        shards: int = 1,
        profile: str | None = None,
        model_shape: str | None = None,
        weights: str = "bfloat16",
        devices: int = 1,
        slower: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _OPTIONS}
        options = read_options(given)
        path = check_model_path(options.model)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise BackendMisconfigured("device: torch sees no CUDA device here")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._device = options.device
        self._dtype = _compute_dtype(options)
        tell = progress or _silent
        tell("open", 0.0)
        checkpoint = open_checkpoint(path)
        try:
            self._prepare(checkpoint, options, tell)
        finally:
            checkpoint.close()

    def _prepare(self, checkpoint: Checkpoint, options: Options, tell: Progress) -> None:
        spec = checkpoint.spec
        pairing: Pairing = spec.pairing if options.rope == "auto" else options.rope
        layout = _layout(checkpoint, options, pairing)
        context = check_context(spec, options.context_tokens, options.blocks * options.block_tokens)
        pool_option = "pool_blocks" if options.pool_blocks is not None else "pool_tokens"
        check_memory(pool_option, layout.block_bytes * options.blocks)
        self._timing = _timing(options, spec, layout)
        if self._timing is not None:
            self._timing.check_room(pool_option, options.blocks * options.block_tokens)
        self._pace = Pace()
        tell("pool", 0.0)
        with torch.inference_mode():
            heads = _shards(layout, options.shards)
            self._pool = PagedPool(layout, options.blocks, options.device, shards=heads)
            tell("pool", 1.0)
            weights = Weights(
                checkpoint, pairing, self._dtype, options.device, lambda part: tell("weights", part)
            )
            rope = Rope(spec, context, pairing, options.device)
            self._model = Transformer(weights, rope)
        pools = [memoryview(it) for it in self._pool.buffers]  # type: ignore[arg-type]
        self.pool = pools if heads else pools[0]
        self.info = BackendInfo(
            layout=layout,
            pool_blocks=options.blocks,
            vocabulary=spec.vocabulary,
            context_tokens=context,
            end_tokens=spec.end_tokens,
            rng="positional",
            continuation="equivalent",
            sampling=HONOURED,
            max_batch=options.max_batch,
            emulated=self._timing is not None,
            emulates=self._timing.title if self._timing is not None else "",
            shards=heads,
        )
        self._limits = Limits(spec.vocabulary, context, options.blocks, options.block_tokens)

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """Compute every row; see `SteppedBackend.step`."""
        if not batch:
            return []
        check_rows(batch, self._limits)
        if self._timing is not None:
            self._pace.begin(self._timing.seconds(batch))
        try:
            with torch.inference_mode():
                outputs = self._step(batch, ready)
        except (RuntimeError, MemoryError) as error:  # torch's own: out of memory, a lost device
            self._pool.abandon()
            raise StepFailed(f"the engine could not compute the step: {error}") from error
        if self._timing is not None and not self._pace.end():
            self._timing.overran(self._pace.late, self._pace.steps)
        return outputs

    def _step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        plan = make_plan(batch, self._pool, self._dtype, self._device)

        def written(layer: int) -> None:
            if self._timing is not None:
                self._pace.reach((layer + 1) / (self.info.layout.layers + 1))
            for chunk in plan.chunks:
                self._pool.publish(chunk.blocks, layer, partial(ready, chunk.row, layer))

        states = self._model.forward(plan, self._pool, written)
        self._publish_decoded(batch)
        self._pool.settle()
        sampled = self._sample(batch, plan, states)
        return [
            Output(tokens, self._prompt_logprobs(row, states[place]))
            for row, place, tokens in zip(batch, plan.places, sampled, strict=True)
        ]

    def ingest(self, blocks: Items[int]) -> None:
        """Take note that other workers have written these blocks of `pool`."""
        with torch.inference_mode():
            self._pool.ingest(self._checked(blocks))

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy KV from the first to the second block of each pair, all layers."""
        with torch.inference_mode():
            self._pool.copy(
                self._checked([source for source, _ in pairs]),
                self._checked([target for _, target in pairs]),
            )

    def close(self) -> None:
        """Let go of weights and pool."""
        self.pool = memoryview(bytearray())
        del self._model, self._pool

    def _checked(self, blocks: Items[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if any(not 0 <= block < self.info.pool_blocks for block in blocks):
            raise StepFailed(f"a block outside the pool of {self.info.pool_blocks}")
        return np.array(blocks, np.int64)

    def _publish_decoded(self, batch: Items[Row]) -> None:
        if self._pool.shadowed:
            size = self._limits.block_tokens
            blocks = [row.blocks[row.start // size] for row in batch if len(row.tokens) == 1]
            self._pool.publish(torch.tensor(blocks, dtype=torch.int64, device=self._device))

    def _sample(
        self, batch: Items[Row], plan: Plan, states: torch.Tensor
    ) -> list[tuple[Sampled, ...]]:
        """A token for each sequence of each row; plain greedy ones by one call for all rows."""
        last = [
            place.stop - 1 for row, place in zip(batch, plan.places, strict=True) if row.sequences
        ]
        if not last:
            return [()] * len(batch)
        whole = last == list(range(len(states)))
        logits = self._model.logits(states if whole else states[last])
        largest, best = logits.max(-1)  # on a CPU three times faster than argmax
        if not torch.isfinite(largest).all():
            raise StepFailed("the model gave logits that are not numbers")
        greedy = best.tolist()
        # one row after another, as float64 copies of a whole batch would not stay in the cache
        host = logits.cpu().numpy() if not _all_greedy(batch) else None
        answers: list[tuple[Sampled, ...]] = []
        number = 0
        for row in batch:
            tokens = []
            for sequence in row.sequences:
                if host is None or is_plain_greedy(sequence):
                    tokens.append(Sampled(greedy[number]))
                else:
                    tokens.append(choose(host[number], sequence, self.info.end_tokens))
            number += bool(row.sequences)
            answers.append(tuple(tokens))
        return answers

    def _prompt_logprobs(self, row: Row, states: torch.Tensor) -> tuple[Logprob, ...]:
        if row.prompt_logprobs is None:
            return ()
        found: list[Logprob] = []
        for start in range(0, len(row.following), _LOGPROB_ROWS):
            following = row.following[start : start + _LOGPROB_ROWS]
            logits = self._model.logits(states[start : start + len(following)]).cpu().numpy()
            found.extend(
                logprob_of(line, token, row.prompt_logprobs)
                for line, token in zip(logits, following, strict=True)
            )
        return tuple(found)


_OPTIONS = frozenset(Options.__struct_fields__)


def _silent(_phase: str, _fraction: float) -> None:
    pass


def _all_greedy(batch: Items[Row]) -> bool:
    return all(is_plain_greedy(sequence) for row in batch for sequence in row.sequences)


def _compute_dtype(options: Options) -> torch.dtype:
    if options.dtype != "auto":
        return TORCH_DTYPES[as_dtype(options.dtype)]
    fast = torch.cuda.is_bf16_supported() if options.device == "cuda" else bfloat16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def _layout(checkpoint: Checkpoint, options: Options, pairing: Pairing) -> KVLayout:
    spec = checkpoint.spec
    weights = str(_compute_dtype(options)).removeprefix("torch.")
    return KVLayout(
        model=checkpoint.identity,
        weights=weights,
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=as_dtype(weights if options.kv_dtype == "auto" else options.kv_dtype),
        block_tokens=options.block_tokens,
        rope=pairing,
        axes=options.axes,
    )


def _timing(options: Options, spec: ModelSpec, layout: KVLayout) -> Timing | None:
    """The timing of an accelerator, with the model itself where no other is named."""
    own = Shape(
        source="the checkpoint",
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        feed_forward=spec.feed_forward,
        vocabulary=spec.vocabulary,
        context_tokens=spec.context_tokens,
        tied=spec.tied,
    )
    return read_timing(
        options.profile, options.model_shape, own,
        weights=options.weights, kv_bytes=layout.item_bytes,
        devices=options.devices, slower=options.slower,
    )  # fmt: skip


def _shards(layout: KVLayout, count: int) -> tuple[Shard, ...]:
    """The heads in each of so many pools; none where there is one."""
    if layout.kv_heads % count:
        raise BackendMisconfigured(f"shards: {layout.kv_heads} KV heads are not {count} times some")
    each = layout.kv_heads // count
    return tuple(Shard(it * each, each) for it in range(count)) if count > 1 else ()
