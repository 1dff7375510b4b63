"""The constructor's arguments; an unknown one is an error, here as there."""

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model, model_validator

from tensorrt_llm.standin.flavour import since


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CapacitySchedulerPolicy(enum.StrEnum):
    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class SchedulerConfig(Strict):
    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    context_chunking_policy: str | None = None


class CacheTransceiverConfig(Strict):
    backend: str | None = None
    max_tokens_in_buffer: int | None = None
    kv_transfer_timeout_ms: int | None = None if not since("1.3") else 60000


class _KvCache(Strict):
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    event_buffer_max_size: int = 0
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    dtype: str = "auto"
    tokens_per_block: int = 32


_LATER: dict[str, Any] = {}
if since("1.3"):
    _LATER["use_kv_cache_manager_v2"] = (bool, False)
if since("main"):
    _LATER["max_util_for_resume"] = (float, 0.95)
KvCacheConfig = create_model("KvCacheConfig", __base__=_KvCache, **_LATER)

if since("1.3"):

    class KvCacheConnectorConfig(Strict):
        connector: str | None = None
        connector_module: str | None = None
        connector_scheduler_class: str | None = None
        connector_worker_class: str | None = None
        server_url: str | None = None

        @model_validator(mode="after")
        def _complete(self):
            names = (
                self.connector_module,
                self.connector_scheduler_class,
                self.connector_worker_class,
            )
            if None in names:
                raise ValueError("connector_module and its two classes are required")
            return self

else:

    class KvCacheConnectorConfig(Strict):
        connector_module: str
        connector_scheduler_class: str
        connector_worker_class: str


class TorchLlmArgs(Strict):
    model: str | Path
    tokenizer: Any = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    model_kwargs: dict[str, Any] | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool = False
    gpus_per_node: int | None = None
    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    max_input_len: int = 1024
    max_beam_width: int = 1
    enable_chunked_prefill: bool = False
    kv_cache_config: KvCacheConfig = KvCacheConfig()  # type: ignore[valid-type]
    scheduler_config: SchedulerConfig = SchedulerConfig()
    cache_transceiver_config: CacheTransceiverConfig | None = None
    kv_connector_config: KvCacheConnectorConfig | None = None
    speculative_config: Any = None
    guided_decoding_backend: str | None = None
    disable_overlap_scheduler: bool = False
    cuda_graph_config: Any = None
    attn_backend: str = "TRTLLM"
    enable_iter_perf_stats: bool = False
    return_perf_metrics: bool = False
    stream_interval: int = 1
    env_overrides: dict[str, str] | None = None
    orchestrator_type: str | None = None
    backend: str = "pytorch"

    @property
    def parallel_config(self):
        return SimpleNamespace(to_mapping=self._mapping)

    def _mapping(self):
        from tensorrt_llm._utils import mpi_rank

        size = self.tensor_parallel_size
        return SimpleNamespace(rank=mpi_rank(), world_size=size, tp_size=size, tp_rank=mpi_rank())
