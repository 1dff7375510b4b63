"""What the connector inside vLLM and the loop that drives it share: the arena, and who is told.

vLLM makes its connectors itself, from a name; `register` gives a desk such a name. There is one
engine per process, and scheduler, connector and loop run in one thread of it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from transfer.layout import KVLayout
from transfer.shared_memory import Bytes

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_desks: dict[str, Desk] = {}


class Told(Protocol):
    """Who hears what becomes of KV, and how many of the engine's blocks a job holds."""

    def exported(self, job: str, start: int, end: int, layer: int | None) -> None:
        """KV of these positions is in the arena, in that layer or in all."""

    def imported(self, job: str) -> None:
        """The engine has the job's KV."""

    def pinned(self, job: str, request: str, blocks: int) -> None:
        """So many blocks are held for one of the job's requests."""


class Desk:
    """The arena as a tensor, cut as `layout` says, and who is told of it."""

    def __init__(self, layout: KVLayout, memory: Bytes, told: Told) -> None:
        self.layout = layout
        self.told = told
        numbers = torch.from_numpy(memory).view(TORCH_DTYPES[layout.dtype])
        block = layout.kv_heads * layout.block_tokens * layout.head_dim * layout.planes
        self.arena = numbers.view(layout.layers, -1, block)
        """Layer, block, and the numbers of that block in the order plane, head, token, dim."""


def register(name: str, desk: Desk) -> None:
    """Let the connector find `desk` under `name`."""
    _desks[name] = desk


def find(name: str) -> Desk:
    """The desk of that name.

    Raises:
        LookupError: this process has none: vLLM made its connector elsewhere.
    """
    if name not in _desks:
        raise LookupError("the connector must run in the process that drives the engine")
    return _desks[name]
