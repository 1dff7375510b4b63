"""A sound plug-in whose pool is in pieces: K and V of each layer are arrays of their own."""

from __future__ import annotations

import msgspec
import numpy as np

from backends.api import allocate
from tests.third_party.abacus_decode import AbacusBackend


class Pieces(AbacusBackend):
    """As an engine has it that keeps a tensor for each layer."""

    def __init__(self, *, model: str, **options: int) -> None:
        super().__init__(model=model, **options)
        layout = msgspec.structs.replace(self.info.layout, axes="layer kv | block token head dim")
        self.info = msgspec.structs.replace(self.info, layout=layout)
        blocks = self.info.pool_blocks
        shape = (blocks, layout.block_tokens, layout.kv_heads, layout.head_dim)
        self.pool = [allocate(4 * int(np.prod(shape))) for _ in range(2 * layout.layers)]
        self._kv = Indexed([it.view(np.float32).reshape(shape) for it in self.pool])


class Indexed:
    """The pieces under the indices that the example uses: [block, token, layer, kv]."""

    def __init__(self, pieces: list[np.ndarray]) -> None:
        self._pieces = pieces

    def __setitem__(self, index, values) -> None:
        if isinstance(index, tuple):
            block, place, layer, kv = index
            self._pieces[2 * layer + kv][block, place] = values
            return
        for piece, value in zip(self._pieces, values, strict=True):
            piece[index] = value

    def __getitem__(self, index):
        if isinstance(index, tuple):
            table, _, layer = index
            return np.stack([self._pieces[2 * layer + kv][table] for kv in (0, 1)], 2)
        return [piece[index] for piece in self._pieces]
