"""What the installed TensorRT-LLM can do, found by looking at it; its version says too little."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import msgspec

from backends.errors import BackendMisconfigured

CONNECTOR_MODULES = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)

BY_DIGEST = "TLLM_BATON_BY_DIGEST"
"""Set in ranks where requests carry no id of the client's choice."""


TOLD = frozenset({"request_id", "new_block_ids", "computed_position", "num_scheduled_tokens"})
"""What a connector must be told of each request before a pass."""


KEEPS_COMPUTED = "simulate_prefill_completion_only_use_for_testing"
"""A helper for the library's tests; it came with the change that `Abilities.cancels` is about."""


class Abilities(msgspec.Struct, frozen=True):
    """What differs between releases.

    `own_ids`: a client may choose the executor's id of a request. `salts`: prompts are kept apart
    by a salt; without that nothing is reused. `cancels`: a request may be cancelled between two
    chunks of its prompt; older releases then keep all of its blocks for reuse, also those that were
    never computed. `second_manager`: a second manager of KV blocks may be asked for.
    """

    own_ids: bool
    salts: bool
    cancels: bool
    second_manager: bool


def connector_api() -> Any:
    """The module with the connector's two base classes, wherever this release keeps it.

    Raises:
        ModuleNotFoundError: there is none, or no TensorRT-LLM.
    """
    for name in CONNECTOR_MODULES[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(CONNECTOR_MODULES[-1])


def abilities(library: Any, args: Any) -> Abilities:
    """What `tensorrt_llm` and its `llmapi.llm_args` have.

    Raises:
        BackendMisconfigured: the release does not say what a pass computes.
    """
    told = {it.name for it in dataclasses.fields(connector_api().RequestData)}
    if missing := sorted(TOLD - told):
        raise BackendMisconfigured(
            f"TensorRT-LLM {library.__version__} does not tell connectors {', '.join(missing)}"
        )
    fields = {it.name for it in dataclasses.fields(library.DisaggregatedParams)}
    salts = "cache_salt" in inspect.signature(library.LLM.generate_async).parameters
    return Abilities(
        own_ids="disagg_request_id" in fields,
        salts=salts,
        cancels=not salts or _has("tensorrt_llm.bindings.internal.testing", KEEPS_COMPUTED),
        second_manager="use_kv_cache_manager_v2" in args.KvCacheConfig.model_fields,
    )


def takes_many_back() -> bool:
    """Whether several requests' blocks may be released in one turn of the executor.

    Older ones unpin those of one of them, and those of the others never.
    """
    return _has("tensorrt_llm._torch.pyexecutor.py_executor", "AsyncTransferManager")


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False
