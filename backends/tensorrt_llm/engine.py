"""The plug-in: TensorRT-LLM as a prefill engine whose KV crosses an arena in host memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from backends.api import (
    BackendError,
    BackendInfo,
    BackendMisconfigured,
    DecodeJob,
    Events,
    PrefillJob,
    allocate,
)
from backends.checkpoint.checks import Progress, check_context, check_memory
from backends.checkpoint.opening import check_model_path
from backends.checkpoint.spec import ModelSpec
from backends.tensorrt_llm.background import Background
from backends.tensorrt_llm.carrying import Carrier
from backends.tensorrt_llm.desk import SCHEDULER, Desk
from backends.tensorrt_llm.geometry import exporting_ranks, layout_of
from backends.tensorrt_llm.library import HONOURED, Library
from backends.tensorrt_llm.messages import FromRank
from backends.tensorrt_llm.model import identity_of, spec_of, weights_of
from backends.tensorrt_llm.options import Options, read_options

log = structlog.get_logger()

ARRIVAL_SECONDS = 10.0
"""Ranks that the library has started have long connected; their words may be on their way."""


class TensorRTLLM:
    """Computes prompts with `tensorrt_llm.LLM` on `tensor_parallel` GPUs, and exports their KV.

    `pool_tokens` (or `pool_blocks`) is the arena's size in host memory, `block_tokens` the block
    size there and in the engine; a prompt is computed in chunks of `chunk_tokens`. `identity` and
    `weights` say how other workers know this checkpoint, where its files do not: a quantised copy
    names the model that it was made of. An exported prompt stays in the engine's memory for
    `lease_seconds` at most. `llm` and `kv_cache` are further arguments of `tensorrt_llm.LLM` and
    of its `KvCacheConfig`.
    """

    def __init__(
        self,
        *,
        model: str,
        tensor_parallel: int = 1,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        block_tokens: int = 32,
        pool_tokens: int | None = None,
        pool_blocks: int | None = None,
        context_tokens: int | None = None,
        max_batch: int = 64,
        chunk_tokens: int = 8192,
        identity: str = "",
        weights: str = "",
        lease_seconds: float = 60.0,
        llm: Mapping[str, Any] | None = None,
        kv_cache: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Start the library, which takes minutes, and make the arena.

        Raises:
            ModuleNotFoundError: it is not installed.
            BackendMisconfigured: an option, the model or what its ranks have registered is none
                that we know; says why.
        """
        given = {key: value for key, value in locals().items() if key in Options.__struct_fields__}
        given.update(llm=dict(llm or {}), kv_cache=dict(kv_cache or {}))
        options = self._options = read_options(given)
        path = check_model_path(options.model)
        spec = spec_of(path)
        context = check_context(spec, options.context_tokens, options.blocks * options.block_tokens)
        self._events: Events | None = None
        self._carrier: Carrier | None = None
        self._dead = ""
        self._came = threading.Condition()
        self._background = Background(self._die)
        self._desk = Desk(self._rank_came, self._hear, self._lost)
        self._background.spawn(self._desk.serve)
        if progress is not None:
            progress("starting TensorRT-LLM", 0.0)
        try:
            self._library = Library(options, spec, context, self._desk.path)
            try:
                self._take_stock(options, path, spec, context)
            except BaseException:
                self._library.close()
                raise
        except BaseException:
            self._background.close()
            self._desk.close()
            raise

    def _take_stock(self, options: Options, path: Path, spec: ModelSpec, context: int) -> None:
        """Look at what the ranks have registered, and give each that exports its arena."""
        world = options.tensor_parallel
        self._wait_for_ranks(world)
        geometries = [self._desk.geometries[rank] for rank in range(world)]
        layout, shards = layout_of(
            geometries,
            spec,
            model=options.identity or identity_of(path),
            weights=options.weights or weights_of(path, options.dtype),
        )
        check_memory("pool_tokens", layout.block_bytes * options.blocks)
        self._exporting = exporting_ranks(world, spec.kv_heads)
        pools = [allocate(it.block_bytes * options.blocks) for it in layout.sharded(shards)]
        self.pool: Any = pools if shards else pools[0]
        for rank, memory in zip(self._exporting, pools, strict=True):
            head_bytes = layout.head_dim * layout.item_bytes
            self._desk.give(rank, memory, options.blocks, head_bytes)
        honoured = HONOURED | ({"min_tokens"} if len(spec.end_tokens) <= 1 else set())
        self.info = BackendInfo(
            kind="engine",
            phases=frozenset({"prefill"}),
            layout=layout,
            shards=shards,
            pool_blocks=options.blocks,
            engine_blocks=geometries[0].shape[0],
            vocabulary=spec.vocabulary,
            context_tokens=context,
            end_tokens=spec.end_tokens,
            rng="engine",
            continuation="equivalent",
            sampling=honoured,
            prompt_logprobs=False,
            max_batch=options.max_batch,
        )

    def _wait_for_ranks(self, world: int) -> None:
        def all_came() -> bool:
            return self._desk.ranks == tuple(range(world)) and self._desk.scheduled

        with self._came:
            if not self._came.wait_for(all_came, ARRIVAL_SECONDS):
                raise BackendMisconfigured(
                    f"of {world} ranks {len(self._desk.ranks)} have connected: the engine's"
                    " processes do not reach this one, or have not been given the connector"
                )

    # ---- the contract

    def start(self, events: Events) -> None:
        """Begin to work."""
        self._events = events
        self._carrier = Carrier(
            self._library,
            self._desk,
            events,
            ranks=tuple(range(self._options.tensor_parallel)),
            exporting=self._exporting,
            lease_seconds=self._options.lease_seconds,
        )
        if self._dead:
            events.died(self._dead)

    def prefill(self, job: PrefillJob) -> None:
        """Take a prefix to compute.

        Raises:
            BackendError: the engine is dead, or does not give log probabilities of prompts.
        """
        if self._dead:
            raise BackendError(f"the engine is dead: {self._dead}")
        if job.prompt_logprobs is not None:
            raise BackendError("prompt_logprobs: not given by TensorRT-LLM here")
        carrier = self._started()
        self._background.spawn(lambda: carrier.carry(carrier.take(job)))

    def decode(self, job: DecodeJob) -> None:
        """Refuse: this engine only prefills.

        Raises:
            BackendError: always.
        """
        raise BackendError(f"{job.name}: TensorRT-LLM only prefills here")

    def abort(self, job: str) -> None:
        """Do no more for a job."""
        self._background.post(self._started().abort, job)

    def pins(self) -> Mapping[str, int]:
        """How many blocks of the engine's own memory each job holds."""
        return dict(self._started().pins)

    def close(self) -> None:
        """Stop the library and all its ranks."""
        self._events = None
        self._background.close()
        self._library.close()
        self._desk.close()

    def _started(self) -> Carrier:
        if self._carrier is None:
            raise BackendError("not started yet")
        return self._carrier

    # ---- the ranks, on the loop's thread

    def _rank_came(self) -> None:
        with self._came:
            self._came.notify_all()

    def _hear(self, rank: int, message: FromRank) -> None:
        if self._carrier is not None:
            self._carrier.hear(rank, message)

    def _lost(self, rank: int, why: str) -> None:
        who = "scheduler" if rank == SCHEDULER else f"rank {rank}"
        self._die(f"its {who} is gone: {why}")

    def _die(self, why: str) -> None:
        if self._dead:
            return
        self._dead = why
        if self._events is not None:
            self._events.died(why)
