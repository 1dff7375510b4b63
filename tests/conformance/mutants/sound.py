"""Plug-ins that keep every promise, and the list of those that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch

from backends.api import allocate
from backends.emulation import EmulationBackend

replace = msgspec.structs.replace
Fields = ClassVar[Mapping[str, Any]]


def fields(**given: Any) -> Mapping[str, Any]:
    """What a mutant states otherwise."""
    return MappingProxyType(given)


MUTANTS: dict[type, str] = {}


def breaks(promise: str):
    """Enter a mutant under the promise that it breaks."""

    def enter(mutant: type) -> type:
        MUTANTS[mutant] = promise
        return mutant

    return enter


class Sound(EmulationBackend):
    """In float32 on one thread, with few blocks."""

    stated: Fields = fields()
    layout: Fields = fields()

    def __init__(
        self,
        *,
        model: str,
        pool_blocks: int = 128,
        block_tokens: int = 16,
        axes: str = "block layer kv head token dim",
        rope: str = "auto",
    ):
        super().__init__(
            model=model,
            dtype="float32",
            threads=1,
            pool_blocks=pool_blocks,
            block_tokens=block_tokens,
            axes=axes,
            rope=rope,
            context_tokens=256,
            max_batch=32,
        )
        layout = replace(self.info.layout, **self.layout)
        self.info = replace(self.info, layout=layout, **self.stated)
        self.begin()

    def begin(self) -> None:
        """What a mutant does once it is made."""

    def change_weights(self) -> None:
        with torch.inference_mode():
            self._model._norm[::2] *= 2

    def bytes_of(self, block: int) -> np.ndarray:
        """A view of one block, where blocks are outermost."""
        size = self.info.layout.block_bytes
        return np.frombuffer(self.pool, np.uint8)[block * size : (block + 1) * size]


class Apart(Sound):
    """Computes in a memory of its own and keeps `pool` equal to it, block by block."""

    def begin(self):
        own = self.pool
        self.pool = allocate(memoryview(own).nbytes)
        self._inner, self._outer = self._by_block(own), self._by_block(self.pool)

    def _by_block(self, memory):
        sizes = self.info.layout.sizes(self.info.pool_blocks)
        shaped = np.frombuffer(memory, np.float32).reshape(list(sizes.values()))
        return np.moveaxis(shaped, list(sizes).index("block"), 0)

    def step(self, batch, ready):
        outputs = super().step(batch, lambda *_: None)
        size = self.info.layout.block_tokens
        for row in batch:
            self.publish(row.blocks[row.start // size :])
        return outputs

    def publish(self, blocks):
        self._outer[list(blocks)] = self._inner[list(blocks)]

    def ingest(self, blocks):
        self._inner[list(blocks)] = self._outer[list(blocks)]
        super().ingest(blocks)

    def copy_blocks(self, pairs):
        super().copy_blocks(pairs)
        self.publish([target for _, target in pairs])
