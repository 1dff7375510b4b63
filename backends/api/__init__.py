"""All that the author of a backend plug-in imports, and the two contracts to choose from.

A *stepped* backend computes; the host that runs it owns blocks, batch, cancellation, transfers
and the network. Write one class with the members of `SteppedBackend` (`stepped.py`). That is what
a kernel, a graph or an emulator wants.

An *engine* owns its scheduler and its memory, as TensorRT-LLM and vLLM do; the host gives it jobs
and takes KV from, and brings KV to, an arena between them. Write one class with the members of
`EngineBackend` (`engine.py`).

Either way, name the class under the entry point group `baton.backends`, and
`baton worker --backend NAME` runs it:

    [project.entry-points."baton.backends"]
    acme = "acme_decode:AcmeBackend"

The class is called with the options of `[workers.X.options]` as keyword arguments, in the
worker's process, before anything else happens; it may take its time to load weights.
`nouns.py` has what both contracts speak of.
"""

from backends.api.engine import DecodeJob, EngineBackend, Events, Job, PrefillJob
from backends.api.nouns import BackendInfo, Logprob, Output, Sampled, Sampling, Sequence
from backends.api.stepped import Ready, Row, SteppedBackend
from backends.errors import (
    BackendError,
    BackendMisconfigured,
    BackendNotFound,
    PoolExhausted,
    StepFailed,
)
from transfer.layout import KVLayout, Shard
from transfer.shared_memory import allocate

Backend = SteppedBackend | EngineBackend

__all__ = [
    "Backend",
    "BackendError",
    "BackendInfo",
    "BackendMisconfigured",
    "BackendNotFound",
    "DecodeJob",
    "EngineBackend",
    "Events",
    "Job",
    "KVLayout",
    "Logprob",
    "Output",
    "PoolExhausted",
    "PrefillJob",
    "Ready",
    "Row",
    "Sampled",
    "Sampling",
    "Sequence",
    "Shard",
    "StepFailed",
    "SteppedBackend",
    "allocate",
]
