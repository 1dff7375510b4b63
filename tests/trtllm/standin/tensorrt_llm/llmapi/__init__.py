from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.llmapi.llm import LLM
from tensorrt_llm.llmapi.llm_args import (
    CacheTransceiverConfig,
    CapacitySchedulerPolicy,
    KvCacheConfig,
    SchedulerConfig,
)
from tensorrt_llm.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CacheTransceiverConfig",
    "CapacitySchedulerPolicy",
    "DisaggregatedParams",
    "KvCacheConfig",
    "SamplingParams",
    "SchedulerConfig",
]
