"""llama.cpp as a stepped backend, over a pool that is Baton's.

Knows rows, blocks and logits; not requests, workers or the network. `library.py` computes,
`cells.py` keeps llama.cpp's memory and the pool together, `sampling.py` chooses tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.api import (
    BackendInfo,
    Logprob,
    Output,
    Ready,
    Row,
    Sampled,
    StepFailed,
    allocate,
)
from backends.checkpoint.checks import Progress, check_context, check_memory
from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.errors import BackendMisconfigured
from backends.llamacpp.cells import Cells, Held
from backends.llamacpp.float32 import float32_copy
from backends.llamacpp.library import Context
from backends.llamacpp.options import SPARE, Options, read_options
from backends.llamacpp.state import Form
from backends.rows import Limits, check_rows
from backends.sampling import HONOURED, choose, logprob_of
from transfer.layout import KVLayout

AXES = "kv layer block token head dim"
"""The order in which llama.cpp writes a sequence: a block's part of a plane is one piece of it."""

_MOST_LOGITS = 256
"""Rows of logits that a call leaves in memory: each is as long as the vocabulary."""


class LlamaCppBackend:
    """A GGUF model of the Llama, Qwen2 or Qwen3 family, on the CPU.

    `model` is the file. `weights` "stored" computes with them as the file has them, "float32" with
    a dequantised copy, written once to `cache_dir` (`~/.cache/baton` unless given), to agree with
    other float32 engines. `kv_dtype` is the pool's and llama.cpp's own. `threads` are those that
    compute, unless given as many as OMP_NUM_THREADS says, else one for each CPU of this process;
    where other processes want these CPUs too, give fewer, for its threads wait by spinning. The
    pool holds `pool_tokens` or `pool_blocks` (one of them; 16,384 tokens unless given) in blocks
    of `block_tokens`; llama.cpp has a memory of its own of the same size. `context_tokens` lowers
    the model's own limit. `progress(phase, fraction)` is called while loading.

    Raises:
        BackendMisconfigured: names the option, what in the file is not supported, or what is
            not known of this version of the library.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str = "stored",
        kv_dtype: str = "float16",
        threads: int | None = None,
        pool_tokens: int | None = None,
        pool_blocks: int | None = None,
        block_tokens: int = 16,
        context_tokens: int | None = None,
        max_batch: int = 64,
        cache_dir: str = "",
        progress: Progress | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _OPTIONS}
        options = read_options(given)
        tell = progress or _silent
        tell("open", 0.0)
        checkpoint = GGUFCheckpoint(options.path)
        try:
            self._prepare(checkpoint, options, tell)
        finally:
            checkpoint.close()

    def _prepare(self, checkpoint: GGUFCheckpoint, options: Options, tell: Progress) -> None:
        spec = checkpoint.spec
        layout = _layout(checkpoint, options)
        tokens = options.blocks * options.block_tokens
        nbytes = layout.block_bytes * options.blocks
        check_memory("pool_tokens", 2 * nbytes)
        path = options.path
        if options.weights == "float32":
            path = float32_copy(checkpoint, options.cache_dir, tell)
        tell("weights", 0.0)
        # Flash attention would round float32 to float16; without it V is transposed.
        form = Form(
            layers=spec.layers,
            numbers=spec.kv_heads * spec.head_dim,
            dtype=layout.dtype,
            transposed=layout.dtype == "float32",
        )
        sequences = options.max_batch + SPARE
        self._context = Context(path, form, cells=tokens, sequences=sequences, threads=options.cpus)
        if self._context.vocabulary != spec.vocabulary:
            raise BackendMisconfigured(
                f"model: llama.cpp counts {self._context.vocabulary} tokens, the file"
                f" {spec.vocabulary}"
            )
        tell("weights", 1.0)
        memory = allocate(nbytes)
        self.pool = memoryview(memory)  # type: ignore[arg-type]
        size = options.block_tokens
        shape = (2, spec.layers, options.blocks, size, form.numbers)
        self._blocks = memory.view(form.item).reshape(shape)
        self._cells = Cells(self._context, form, self._blocks, sequences)
        self.info = BackendInfo(
            layout=layout,
            pool_blocks=options.blocks,
            vocabulary=spec.vocabulary,
            context_tokens=check_context(spec, options.context_tokens, tokens),
            end_tokens=spec.end_tokens,
            rng="positional",
            continuation="equivalent",
            sampling=HONOURED,
            max_batch=options.max_batch,
        )
        self._limits = Limits(spec.vocabulary, self.info.context_tokens, options.blocks, size)

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """Compute every row; see `SteppedBackend.step`."""
        check_rows(batch, self._limits)
        if len(batch) > self.info.max_batch:
            raise StepFailed(f"{len(batch)} rows of at most {self.info.max_batch}")
        try:
            helds = self._cells.prepare(batch)
            outputs = self._compute(batch, helds)
            self._cells.store(batch, helds)
        except BaseException:
            self._cells.forget()
            raise
        return outputs

    def ingest(self, blocks: Items[int]) -> None:
        """Take note that other workers have written these blocks of `pool`."""
        self._check(blocks)
        self._cells.written(blocks)

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy KV from the first to the second block of each pair, all layers."""
        self._check([block for pair in pairs for block in pair])
        for source, target in pairs:
            self._blocks[:, :, target] = self._blocks[:, :, source]
        self._cells.written([target for _, target in pairs])

    def close(self) -> None:
        """Let go of weights and pool."""
        self._context.close()
        self.pool = memoryview(bytearray())
        del self._blocks, self._cells

    def _check(self, blocks: Items[int]) -> None:
        if any(not 0 <= block < self.info.pool_blocks for block in blocks):
            raise StepFailed(f"a block outside the pool of {self.info.pool_blocks}")

    def _compute(self, batch: Items[Row], helds: Items[Held]) -> list[Output]:
        gathered = [_Gathered(row) for row in batch]
        for tokens in _calls(batch, helds, self._context.batch_tokens):
            while not self._context.compute(
                [it.token for it in tokens],
                [it.position for it in tokens],
                [it.sequence for it in tokens],
                [it.wanted for it in tokens],
            ):
                if not self._cells.shrink():
                    raise StepFailed(f"llama.cpp has no room for {len(tokens)} tokens")
            for place, token in enumerate(tokens):
                if token.wanted:
                    logits = self._context.logits(place)
                    gathered[token.row].add(token.position, logits, self.info.end_tokens)
        return [it.output for it in gathered]


_OPTIONS = frozenset(Options.__struct_fields__)


class _Token(msgspec.Struct, frozen=True):
    """One token of one row, and whether its logits are wanted."""

    row: int
    token: int
    position: int
    sequence: int
    wanted: bool


class _Gathered:
    """What a row gives, from the logits of its tokens as they come."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._sampled: tuple[Sampled, ...] = ()
        self._logprobs: list[Logprob] = []

    def add(self, position: int, logits: NDArray[np.float32], ends: Items[int]) -> None:
        """Take the logits of one token; they change with the next call of the library."""
        row, place = self._row, position - self._row.start
        if row.prompt_logprobs is not None and place < len(row.following):
            self._logprobs.append(logprob_of(logits, row.following[place], row.prompt_logprobs))
        if place == len(row.tokens) - 1:
            self._sampled = tuple(choose(logits, one, ends) for one in row.sequences)

    @property
    def output(self) -> Output:
        """All of it, once every token was added."""
        return Output(self._sampled, tuple(self._logprobs))


def _silent(_phase: str, _fraction: float) -> None:
    pass


def _calls(batch: Items[Row], helds: Items[Held], most: int) -> Iterator[list[_Token]]:
    """All tokens of a step in order, at most so many at once."""
    call: list[_Token] = []
    logits = 0
    for number, (row, held) in enumerate(zip(batch, helds, strict=True)):
        last = len(row.tokens) - 1
        for place, token in enumerate(row.tokens):
            wanted = (bool(row.sequences) and place == last) or row.prompt_logprobs is not None
            if len(call) == most or (logits == _MOST_LOGITS and wanted):
                yield call
                call, logits = [], 0
            call.append(_Token(number, token, row.start + place, held.sequence, wanted))
            logits += wanted
    if call:
        yield call


def _layout(checkpoint: GGUFCheckpoint, options: Options) -> KVLayout:
    spec = checkpoint.spec
    return KVLayout(
        model=checkpoint.identity,
        weights=_stored(checkpoint) if options.weights == "stored" else "float32",
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=options.kv_dtype,
        block_tokens=options.block_tokens,
        rope=spec.pairing,
        axes=AXES,
    )


def _stored(checkpoint: GGUFCheckpoint) -> str:
    """How the coarsest of the file's matrices is kept: nobody else's weights are equal to that."""
    matrices = [it for it in checkpoint.names() if len(checkpoint.shape(it)) > 1]
    kinds = {checkpoint.stored(it)[0] for it in matrices}
    coarsest = min(kinds, key=_bytes_each)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(coarsest.name, coarsest.name.lower())


def _bytes_each(kind: gguf.GGMLQuantizationType) -> float:
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return nbytes / numbers
