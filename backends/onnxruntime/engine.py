"""Llama, Qwen2 and Qwen3 in ONNX Runtime as a stepped backend, on the CPU.

`packing.py` reads the weights, `graph.py` makes a graph of them, `library.py` runs it; in the
graph, `attention.py` works on the pool, told by `desk.py` what a step consists of.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api import BackendInfo, Logprob, Output, Ready, Row, Sampled, StepFailed, allocate
from backends.checkpoint.checks import (
    DEFAULT_AXES,
    Progress,
    as_dtype,
    check_context,
    check_memory,
)
from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.checkpoint.opening import check_model_path, open_checkpoint
from backends.checkpoint.spec import Checkpoint, Pairing
from backends.errors import BackendMisconfigured
from backends.onnxruntime import attention, graph
from backends.onnxruntime.desk import Desk, Norms
from backends.onnxruntime.library import OnnxRuntimeFailed, Operator, Session, library
from backends.onnxruntime.options import Options, read_options
from backends.onnxruntime.packing import Weights, is_four_bit
from backends.rows import Limits, check_rows
from backends.sampling import HONOURED, choose, is_plain_greedy, logprob_of
from transfer.layout import KVLayout

Logits = NDArray[np.float32]


class OnnxRuntimeBackend:
    """Llama, Qwen2 or Qwen3 from a GGUF file or a Hugging Face folder.

    `model` is the path. `weights` "q4" multiplies a GGUF file's blocks of four bits as they are
    with activations rounded to int8; "float32" is exact; "auto" is q4 where the file has such
    blocks. `kv_dtype` is the pool's, "auto" is float32. `threads` are those that compute, unless
    given as many as OMP_NUM_THREADS says, else one for each CPU of this process. `pool_tokens`,
    `pool_blocks`, `block_tokens`, `axes`, `context_tokens`, `rope` and `max_batch` mean what they
    mean for `EmulationBackend`. `progress(phase, fraction)` is called while loading.

    What a token gives does not depend on the batch around it, nor on where a prompt was cut, to
    the bit: `continuation` is "exact".

    Raises:
        BackendMisconfigured: names the option, or what in the checkpoint is not supported.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str = "auto",
        kv_dtype: str = "auto",
        threads: int | None = None,
        pool_tokens: int | None = None,
        pool_blocks: int | None = None,
        block_tokens: int = 16,
        axes: str = DEFAULT_AXES,
        context_tokens: int | None = None,
        rope: str = "auto",
        max_batch: int = 256,
        progress: Progress | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _OPTIONS}
        options = read_options(given)
        path = check_model_path(options.model)
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
        packed = _packed(checkpoint, options)
        layout = _layout(checkpoint, options, pairing, packed=packed)
        context = check_context(spec, options.context_tokens, options.blocks * options.block_tokens)
        nbytes = layout.block_bytes * options.blocks
        check_memory("pool_blocks" if options.pool_blocks is not None else "pool_tokens", nbytes)
        tell("pool", 0.0)
        memory = allocate(nbytes)
        tell("pool", 1.0)
        self.pool = memoryview(memory)  # type: ignore[arg-type]
        self._blocks = _by_block(memory, layout)
        weights = Weights(checkpoint, pairing, packed=packed)
        threads = options.cpus
        self._desk = Desk(
            library(), spec, layout, pairing, memory, context, _norms(weights), threads
        )
        tell("weights", 0.0)
        decoder = graph.build(weights)
        tell("weights", 0.5)
        self._session = Session(
            decoder.model(spec.vocabulary),
            decoder.weights,
            Operator(attention.compute.address, self._desk.operator),
            threads,
        )
        tell("weights", 1.0)
        self.info = BackendInfo(
            layout=layout,
            pool_blocks=options.blocks,
            vocabulary=spec.vocabulary,
            context_tokens=context,
            end_tokens=spec.end_tokens,
            rng="positional",
            continuation="exact",
            sampling=HONOURED,
            max_batch=options.max_batch,
        )
        self._limits = Limits(spec.vocabulary, context, options.blocks, options.block_tokens)

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """Compute every row; see `SteppedBackend.step`."""
        if not batch:
            return []
        check_rows(batch, self._limits)
        chunks = [number for number, row in enumerate(batch) if len(row.tokens) > 1]

        def heard(layer: int) -> None:
            for number in chunks:
                ready(number, layer)

        tokens = self._desk.lay(batch, heard if chunks else None)
        wanted, places = _wanted(batch)
        try:
            logits = self._session.run({graph.TOKENS: tokens, graph.WANTED: wanted}, graph.LOGITS)
        except OnnxRuntimeFailed as error:
            raise StepFailed(f"ONNX Runtime could not compute the step: {error}") from error
        self._desk.raise_heard()
        logits = logits.reshape(len(wanted), self.info.vocabulary)
        sampled = self._sample(batch, places, logits)
        return [
            Output(tokens, _prompt_logprobs(row, logits[place]))
            for row, place, tokens in zip(batch, places, sampled, strict=True)
        ]

    def ingest(self, blocks: Items[int]) -> None:
        """Take note that other workers have written these blocks: nothing is kept of them."""
        self._check(blocks)

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy KV from the first to the second block of each pair, all layers."""
        self._check([block for pair in pairs for block in pair])
        for source, target in pairs:
            self._blocks[target] = self._blocks[source]

    def close(self) -> None:
        """Let go of weights and pool."""
        self._session.close()
        self.pool = memoryview(bytearray())
        del self._session, self._desk, self._blocks

    def _check(self, blocks: Items[int]) -> None:
        if any(not 0 <= block < self.info.pool_blocks for block in blocks):
            raise StepFailed(f"a block outside the pool of {self.info.pool_blocks}")

    def _sample(
        self, batch: Items[Row], places: Items[slice], logits: Logits
    ) -> list[tuple[Sampled, ...]]:
        """A token for each sequence of each row; plain greedy ones by one call for all rows."""
        best = logits.argmax(1)  # the first NaN, where there is one
        if not np.isfinite(logits[np.arange(len(best)), best]).all():
            raise StepFailed("the model gave logits that are not numbers")
        answers: list[tuple[Sampled, ...]] = []
        for row, place in zip(batch, places, strict=True):
            last = place.stop - 1
            answers.append(
                tuple(
                    Sampled(int(best[last]))
                    if is_plain_greedy(sequence)
                    else choose(logits[last], sequence, self.info.end_tokens)
                    for sequence in row.sequences
                )
            )
        return answers


_OPTIONS = frozenset(Options.__struct_fields__)


def _silent(_phase: str, _fraction: float) -> None:
    pass


def _packed(checkpoint: Checkpoint, options: Options) -> bool:
    if options.weights == "q4" and not isinstance(checkpoint, GGUFCheckpoint):
        raise BackendMisconfigured("weights: q4 needs a GGUF file; this is a folder")
    return options.weights == "q4" or (options.weights == "auto" and is_four_bit(checkpoint))


def _layout(
    checkpoint: Checkpoint, options: Options, pairing: Pairing, *, packed: bool
) -> KVLayout:
    spec = checkpoint.spec
    return KVLayout(
        model=checkpoint.identity,
        weights="q4" if packed else "float32",
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=as_dtype("float32" if options.kv_dtype == "auto" else options.kv_dtype),
        block_tokens=options.block_tokens,
        rope=pairing,
        axes=options.axes,
    )


def _by_block(memory: NDArray[Any], layout: KVLayout) -> NDArray[Any]:
    """The pool with its blocks in the first dimension."""
    kind = np.uint32 if layout.item_bytes == 4 else np.uint16
    sizes = layout.sizes(len(memory) // layout.block_bytes)
    return np.moveaxis(
        memory.view(kind).reshape(list(sizes.values())), list(sizes).index("block"), 0
    )


def _norms(weights: Weights) -> list[Norms]:
    if not weights.spec.qk_norm:
        return []
    names = [f"blk.{layer}.attn" for layer in range(weights.spec.layers)]
    return [
        (weights.vector(f"{name}_q_norm.weight"), weights.vector(f"{name}_k_norm.weight"))
        for name in names
    ]


def _wanted(batch: Items[Row]) -> tuple[NDArray[np.int64], list[slice]]:
    """The flat tokens whose logits are needed, and each row's places among them."""
    wanted: list[int] = []
    places = []
    flat = 0
    for row in batch:
        before, end = len(wanted), flat + len(row.tokens)
        if row.prompt_logprobs is not None:
            wanted.extend(range(flat, end))
        elif row.sequences:
            wanted.append(end - 1)
        places.append(slice(before, len(wanted)))
        flat = end
    return np.array(wanted, np.int64), places


def _prompt_logprobs(row: Row, logits: Logits) -> tuple[Logprob, ...]:
    if row.prompt_logprobs is None:
        return ()
    return tuple(
        logprob_of(line, token, row.prompt_logprobs)
        for line, token in zip(logits, row.following, strict=False)
    )
