"""Where a pool lies in memory: from offsets in its flat, virtual array to addresses.

A pool is one region or several (see `KVLayout.axes`), wherever their owner has put them. Everybody
else counts offsets through all of them; only who copies asks `Pool` for addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from transfer.layout import KVLayout

Buffer = Any
"""A whole pool: an object with the buffer protocol, C-contiguous, that holds all regions one after
the other; or a list or tuple of such objects, one for each region. The target's is writable."""


class Pool:
    """One pool's memory, kept alive and in place.

    `bases` are the addresses of its regions, each `region_bytes` long; `nbytes` is all of it.
    """

    def __init__(self, regions: Sequence[NDArray[np.uint8]]) -> None:
        """Take regions of one size; `Pool.of` is the way in."""
        self.regions = tuple(regions)
        self.region_bytes = regions[0].size
        self.nbytes = self.region_bytes * len(regions)
        self.bases: NDArray[np.int64] = np.array([it.ctypes.data for it in regions], np.int64)
        if (np.diff(self.bases) == self.region_bytes).all():  # in one piece after all
            self.bases, self.region_bytes = self.bases[:1], self.nbytes

    @classmethod
    def of(cls, layout: KVLayout, blocks: int, buffers: Buffer) -> Self:
        """The pool of `blocks` blocks in `layout` that lies in `buffers`.

        Raises:
            ValueError: their number or length is not that of such a pool.
        """
        regions = layout.regions(blocks)
        size = blocks * layout.block_bytes
        if isinstance(buffers, list | tuple):
            flat = [np.frombuffer(it, dtype=np.uint8) for it in buffers]
            if len(flat) != regions or any(it.size * regions != size for it in flat):
                raise ValueError(
                    f"pool: {len(flat)} buffers of {sorted({it.size for it in flat})} bytes are "
                    f"not {regions} of {size // regions}, for {blocks} blocks"
                )
            return cls(flat)
        whole = np.frombuffer(buffers, dtype=np.uint8)
        if whole.size != size:
            raise ValueError(
                f"pool: {whole.size} bytes are not {blocks} blocks of {layout.block_bytes}"
            )
        return cls([whole])

    @property
    def writable(self) -> bool:
        """Whether every region may be written to."""
        return all(it.flags.writeable for it in self.regions)

    def addresses(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in memory the bytes at `offsets` of the virtual array lie."""
        if len(self.bases) == 1:
            return offsets + int(self.bases[0])
        region, within = np.divmod(offsets, self.region_bytes)
        where: NDArray[np.int64] = self.bases[region] + within
        return where

    def parts(self, offset: int, length: int) -> list[NDArray[np.uint8]]:
        """The memory of `length` bytes from `offset` on: one view for each region it touches.

        Raises:
            ValueError: it is not all within the pool.
        """
        if not 0 <= offset <= offset + length <= self.nbytes:
            raise ValueError(f"{length} bytes at {offset} are not within a pool of {self.nbytes}")
        size = self.regions[0].size
        views = []
        while length:
            region, within = divmod(offset, size)
            some = min(length, size - within)
            views.append(self.regions[region][within : within + some])
            offset, length = offset + some, length - some
        return views
