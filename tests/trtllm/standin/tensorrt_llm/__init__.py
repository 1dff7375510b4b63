"""A stand-in for TensorRT-LLM: its contract without its kernels.

It has the names, parameters and fields that `contract.toml` lists, in the flavour that the
variable `TLLM_STANDIN` asks for ("1.2", "1.3" or "main"), and behaves as the library does where an
exporter of KV could go wrong: paged and reused blocks, chunks, overlap, cancels, ranks in processes
of their own. KV is a function of the tokens before it. `standin/` holds what the library has not.
"""

from tensorrt_llm._utils import mpi_rank, mpi_world_size
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.llmapi.llm import LLM
from tensorrt_llm.logging import logger
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.standin.flavour import FLAVOUR

__all__ = ["LLM", "DisaggregatedParams", "SamplingParams", "logger", "mpi_rank", "mpi_world_size"]

__version__ = {"1.2": "1.2.1", "1.3": "1.3.0rc29", "main": "1.4.0.dev0"}[FLAVOUR]
