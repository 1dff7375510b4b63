"""vLLM as an engine: KV comes and goes through an arena, tokens through a socket.

The worker owns the arena; `child.py` starts the process in which vLLM runs, `process.py` is what
runs there, `connector.py` what vLLM loads. This file states what the engine is and passes jobs and
events on. It does not import vLLM.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import msgspec

from backends.api import (
    BackendError,
    BackendInfo,
    DecodeJob,
    Events,
    KVLayout,
    PrefillJob,
    StepFailed,
    allocate,
)
from backends.checkpoint.checks import Progress, check_memory, check_whole
from backends.checkpoint.huggingface import HuggingFaceCheckpoint
from backends.errors import BackendMisconfigured
from backends.vllm.child import Child
from backends.vllm.messages import (
    Abort,
    Decoded,
    Ended,
    Failed,
    FromEngine,
    Imported,
    Pinned,
    Prefilled,
    Ready,
    Setup,
    TakeDecode,
    TakePrefill,
)
from backends.vllm.options import Options, read_options
from backends.vllm.sampling import HONOURED
from transfer.shared_memory import segment_of

AXES = "layer block kv head token dim"


class VllmBackend:
    """vLLM in a process of its own, for prefill and decode, on the device it was built for.

    `model` is a folder in Hugging Face form (`baton export` makes one of a GGUF file). `dtype` is
    the precision of weights, arithmetic and KV. `threads` are those of its process, on a CPU. The
    arena holds `pool_tokens` or `pool_blocks` (one of them; 16,384 tokens unless given) in blocks
    of `block_tokens`, which are vLLM's own; vLLM's cache holds `cache_tokens`. `context_tokens`
    lowers the model's own limit. vLLM runs at most `max_batch` sequences at a time and computes at
    most `step_tokens` prompt tokens in a step; `compile` lets it compile the model, which takes
    minutes. It must have loaded within `load_seconds`.

    Raises:
        BackendMisconfigured: names the option, or what vLLM refuses, or how its KV differs from
            what the model's configuration says.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: str = "bfloat16",
        threads: int | None = None,
        pool_tokens: int | None = None,
        pool_blocks: int | None = None,
        block_tokens: int = 32,
        cache_tokens: int = 16384,
        context_tokens: int | None = None,
        max_batch: int = 64,
        step_tokens: int = 2048,
        compile: bool = False,  # noqa: A002 -- an option's name
        load_seconds: int = 600,
        progress: Progress | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _OPTIONS}
        options = read_options(given)
        if find_spec("vllm") is None:
            raise BackendMisconfigured("vLLM is not installed here; see CONTRIBUTING.md")
        checkpoint = _open(options.model)
        try:
            self.info = _info(checkpoint, options)
        finally:
            checkpoint.close()
        layout = self.info.layout
        check_memory("pool_tokens", layout.block_bytes * options.blocks)
        self.pool = allocate(layout.block_bytes * options.blocks)
        segment = segment_of(self.pool)
        assert segment is not None
        settled = msgspec.structs.replace(options, context_tokens=self.info.context_tokens)
        if progress is not None:
            progress("weights", 0.0)
        setup = Setup(
            options=settled,
            layout=layout,
            arena_fd=segment.fd,
            arena_bytes=self.pool.nbytes,
            end_tokens=self.info.end_tokens,
            bound=threading.current_thread() is threading.main_thread(),
        )
        self._child = Child(setup, options.threads)
        try:
            self.engine = self._child.loaded(options.load_seconds)
        except BaseException:
            self._child.close()
            raise
        self._pins: dict[str, int] = {}
        self._events: Events | None = None

    @property
    def pid(self) -> int:
        """The process in which vLLM runs."""
        return self._child.pid

    def start(self, events: Events) -> None:
        """Answer to `events` from now on."""
        self._events = events
        self._child.listen(self._hear, events.died)

    def prefill(self, job: PrefillJob) -> None:
        """Take a prefix to compute."""
        for sequence in job.sequences:
            self._check(sequence.sampling.logprobs)
        self._check(job.prompt_logprobs)
        self._child.tell(TakePrefill(job))

    def decode(self, job: DecodeJob) -> None:
        """Take a sequence to decode."""
        self._check(job.sequence.sampling.logprobs)
        self._check(job.prompt_logprobs)
        self._child.tell(TakeDecode(job))

    def abort(self, job: str) -> None:
        """Do no more for a job."""
        self._child.tell(Abort(job))

    def pins(self) -> Mapping[str, int]:
        """How many of vLLM's blocks each job holds."""
        return self._pins

    def close(self) -> None:
        """End vLLM's process."""
        self._child.close()

    def _check(self, logprobs: int | None) -> None:
        if logprobs is not None and logprobs > self.info.vocabulary:
            raise StepFailed(f"logprobs: {logprobs} of {self.info.vocabulary} tokens")

    def _hear(self, message: FromEngine) -> None:
        events = self._events
        assert events is not None
        match message:
            case Ready():
                events.ready(message.job, message.start, message.end, message.layer)
            case Prefilled():
                events.prefilled(message.job, message.output, message.cached)
            case Imported():
                events.imported(message.job)
            case Decoded():
                events.decoded(message.tokens)
            case Failed():
                events.failed(message.job, BackendError(message.detail))
            case Ended():
                self._pins = {job: held for job, held in self._pins.items() if job != message.job}
                events.ended(message.job)
            case Pinned():
                self._pins = {**self._pins, message.job: message.blocks}


_OPTIONS = frozenset(Options.__struct_fields__)


def _open(model: str) -> HuggingFaceCheckpoint:
    path = Path(model).expanduser()
    if not (path / "config.json").is_file():
        raise BackendMisconfigured(
            f"model: vLLM reads folders in Hugging Face form, {model!r} is none;"
            " `baton export` makes one of a GGUF file"
        )
    return HuggingFaceCheckpoint(path)


def _info(checkpoint: HuggingFaceCheckpoint, options: Options) -> BackendInfo:
    spec = checkpoint.spec
    # vLLM counts the token after the last in its length, too.
    most = min(spec.context_tokens - 1, options.blocks * options.block_tokens, options.cache_tokens)
    check_whole("context_tokens", options.context_tokens, most)
    return BackendInfo(
        layout=KVLayout(
            model=checkpoint.identity,
            weights=options.dtype,
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=options.dtype,
            block_tokens=options.block_tokens,
            rope=spec.pairing,
            axes=AXES,
        ),
        pool_blocks=options.blocks,
        vocabulary=spec.vocabulary,
        context_tokens=options.context_tokens or most,
        end_tokens=spec.end_tokens,
        rng="engine",
        continuation="equivalent",
        sampling=HONOURED,
        max_batch=options.max_batch,
        kind="engine",
        engine_blocks=-(-options.cache_tokens // options.block_tokens),
    )
