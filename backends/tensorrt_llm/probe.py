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


class Abilities(msgspec.Struct, frozen=True):
    """What differs between releases.

    `own_ids`: a client may choose the executor's id of a request. `salts`: prompts are kept apart
    by a salt; without that nothing is reused. `second_manager`: a second manager of KV blocks may
    be asked for.
    """

    own_ids: bool
    salts: bool
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
    return Abilities(
        own_ids="disagg_request_id" in fields,
        salts="cache_salt" in inspect.signature(library.LLM.generate_async).parameters,
        second_manager="use_kv_cache_manager_v2" in args.KvCacheConfig.model_fields,
    )
