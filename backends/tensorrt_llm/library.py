"""All calls into TensorRT-LLM from the worker's process: how it is started and asked.

What a release has is found by looking at it (`probe.py` for the connector): fields of its
dataclasses, parameters of its functions. An unknown argument is an error there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from backends.api import Sampling, Sequence
from backends.checkpoint.spec import ModelSpec
from backends.errors import BackendMisconfigured
from backends.tensorrt_llm.messages import VARIABLE
from backends.tensorrt_llm.options import Options
from backends.tensorrt_llm.probe import BY_DIGEST, Abilities, abilities

CONNECTOR = "backends.tensorrt_llm.connector"

HONOURED = frozenset(
    {
        *("temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos"),
        *("presence_penalty", "frequency_penalty"),  # of generated tokens: there is none yet
    }
)
"""What of `Sampling` the first token of an answer is sampled by, or what cannot change it."""

_SEED_BITS = (1 << 63) - 1


class Library:
    """The library, started. Its calls return at once, but for the constructor and `close`."""

    def __init__(self, options: Options, spec: ModelSpec, context: int, socket: str) -> None:
        """Start it, which takes minutes.

        Raises:
            ModuleNotFoundError: it is not installed.
            BackendMisconfigured: it refuses an argument.
        """
        self._module = importlib.import_module("tensorrt_llm")
        self._args = importlib.import_module("tensorrt_llm.llmapi.llm_args")
        self.errors = importlib.import_module("tensorrt_llm.executor.utils")
        self.can: Abilities = abilities(self._module, self._args)
        self._end = spec.end_tokens[0] if spec.end_tokens else -1
        with _told(socket, by_digest=not self.can.own_ids):
            try:
                self._llm = self._module.LLM(**self._arguments(options, context))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise BackendMisconfigured(f"TensorRT-LLM refuses to start: {error}") from error

    def _arguments(self, options: Options, context: int) -> dict[str, Any]:
        cache: dict[str, Any] = {
            "tokens_per_block": options.block_tokens,
            "enable_block_reuse": self.can.salts,
            "enable_partial_reuse": False,
            "dtype": options.kv_dtype,
        }
        if self.can.second_manager:
            cache["use_kv_cache_manager_v2"] = False
        args = self._args
        return {
            "model": options.model,
            "backend": "pytorch",
            "attn_backend": "TRTLLM",
            "tensor_parallel_size": options.tensor_parallel,
            "dtype": options.dtype,
            "skip_tokenizer_init": True,
            "cuda_graph_config": None,
            "disable_overlap_scheduler": True,
            "enable_chunked_prefill": True,
            "max_num_tokens": options.chunk_tokens,
            "max_batch_size": options.max_batch,
            "max_seq_len": context + 1,
            "max_beam_width": 1,
            "scheduler_config": args.SchedulerConfig(
                capacity_scheduler_policy=args.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
            ),
            "kv_cache_config": args.KvCacheConfig(**{**cache, **options.kv_cache}),
            "kv_connector_config": args.KvCacheConnectorConfig(
                connector_module=CONNECTOR,
                connector_scheduler_class="ExportScheduler",
                connector_worker_class="ExportWorker",
            ),
            **options.llm,
        }

    def submit(
        self, tokens: list[int], sequence: Sequence | None, salt: str, request: int | None
    ) -> Any:
        """Have `tokens` computed and one token sampled. `request` becomes the executor's own id.

        Raises:
            ValueError, TypeError, NotImplementedError, RequestError: it cannot be done.
            RuntimeError: the library is gone.
        """
        more: dict[str, Any] = {}
        if request is not None:
            more["disaggregated_params"] = self._module.DisaggregatedParams(
                request_type="context_and_generation", disagg_request_id=request
            )
        if self.can.salts:
            more["cache_salt"] = salt
        return self._llm.generate_async(
            tokens, sampling_params=self._sampling(sequence), streaming=False, **more
        )

    def _sampling(self, sequence: Sequence | None) -> Any:
        chosen: dict[str, Any] = {"max_tokens": 1, "end_id": self._end, "detokenize": False}
        sampling = sequence.sampling if sequence is not None else Sampling(temperature=0.0)
        if sampling.temperature == 0:
            chosen["top_k"] = 1
        else:
            chosen["temperature"] = sampling.temperature
            chosen["top_p"] = sampling.top_p
            chosen["top_k"] = max(0, sampling.top_k)
        if sampling.min_tokens:
            chosen["min_tokens"] = 1
        if sequence is not None:
            chosen["seed"] = sequence.seed & _SEED_BITS
        return self._module.SamplingParams(**chosen)

    def close(self) -> None:
        """Stop all ranks."""
        self._llm.shutdown()


@contextmanager
def _told(socket: str, *, by_digest: bool) -> Iterator[None]:
    """Tell the ranks, which are started inside, where to connect."""
    told = {VARIABLE: socket, **({BY_DIGEST: "1"} if by_digest else {})}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]
