"""Where a pool lies in memory: from offsets in its flat, virtual array to addresses.

A pool is one region or several (see `KVLayout.axes`), wherever their owner has put them. Everybody
else counts offsets through all of them; only who copies asks `Pool` for addresses.
"""

from __future__ import annotations

import itertools
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.layout import Array, KVLayout

Buffer = Any
"""A whole pool: an object with the buffer protocol, C-contiguous, that holds all regions one after
the other; or a list or tuple of such objects, one for each region, those of the scales last; or a
`Pool`. The target's is writable."""


class Table(msgspec.Struct, frozen=True, eq=False):
    """One array of a pool: the offset where it begins, and the addresses of its regions.

    Regions that lie one after the other in memory are one.
    """

    start: int
    region_bytes: int
    bases: NDArray[np.int64]


class Pool:
    """One pool's memory, kept alive and in place.

    `regions` is that memory, in order; `starts` are the offsets where they begin (and the end of
    the last), `bases` their addresses; `nbytes` is all of it. `tables` are the pool's numbers and,
    where there are any, its scales.
    """

    def __init__(self, layout: KVLayout, blocks: int, regions: list[NDArray[np.uint8]]) -> None:
        """Take regions of the right number and sizes; `Pool.of` is the way in."""
        self.regions = tuple(regions)
        self.layout, self.blocks = layout, blocks
        sizes = [it.size for it in regions]
        self.starts: NDArray[np.int64] = np.array([0, *itertools.accumulate(sizes)], np.int64)
        self.bases: NDArray[np.int64] = np.array([it.ctypes.data for it in regions], np.int64)
        self.nbytes = int(self.starts[-1])
        tables = []
        first = 0
        for array in layout.tables(blocks):
            bases = self.bases[first : first + array.regions]
            size = array.nbytes // array.regions
            if len(bases) == 1 or (np.diff(bases) == size).all():
                bases, size = bases[:1], array.nbytes
            tables.append(Table(int(self.starts[first]), size, bases))
            first += array.regions
        self.tables = tuple(tables)

    @classmethod
    def of(cls, layout: KVLayout, blocks: int, buffers: Buffer) -> Self:
        """The pool of `blocks` blocks in `layout` that lies in `buffers`.

        Raises:
            ValueError: their number or length is not that of such a pool.
        """
        if isinstance(buffers, cls):
            if buffers.blocks != blocks or buffers.layout != layout:
                raise ValueError(f"pool: it is not one of {blocks} blocks in this layout")
            return buffers
        arrays = layout.tables(blocks)
        if isinstance(buffers, list | tuple):
            flat = [np.frombuffer(it, dtype=np.uint8) for it in buffers]
            # Counted first: a stranger's layout may claim more regions than can be listed.
            count = sum(it.regions for it in arrays)
            if len(flat) != count or [it.size for it in flat] != _sizes(arrays):
                raise ValueError(
                    f"pool: {len(flat)} buffers of {sorted({it.size for it in flat})} bytes are "
                    f"not {count} of {sorted({_size(it) for it in arrays})}, for {blocks} blocks"
                )
            return cls(layout, blocks, flat)
        whole = np.frombuffer(buffers, dtype=np.uint8)
        if whole.size != sum(it.nbytes for it in arrays):
            raise ValueError(
                f"pool: {whole.size} bytes are not {blocks} blocks of {layout.block_bytes}"
            )
        ends = list(itertools.accumulate(_sizes(arrays)))
        cuts = itertools.pairwise([0, *ends])
        return cls(layout, blocks, [whole[start:end] for start, end in cuts])

    @property
    def writable(self) -> bool:
        """Whether every region may be written to."""
        return all(it.flags.writeable for it in self.regions)

    def addresses(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in memory the bytes at `offsets` of the virtual array lie."""
        if len(self.regions) == 1:
            return offsets + int(self.bases[0])
        region = np.searchsorted(self.starts, offsets, side="right") - 1
        where: NDArray[np.int64] = self.bases[region] + (offsets - self.starts[region])
        return where

    def parts(self, offset: int, length: int) -> list[NDArray[np.uint8]]:
        """The memory of `length` bytes from `offset` on: one view for each region it touches.

        Raises:
            ValueError: it is not all within the pool.
        """
        if not 0 <= offset <= offset + length <= self.nbytes:
            raise ValueError(f"{length} bytes at {offset} are not within a pool of {self.nbytes}")
        views = []
        region = int(np.searchsorted(self.starts, offset, side="right")) - 1
        while length:
            within = offset - int(self.starts[region])
            some = min(length, self.regions[region].size - within)
            views.append(self.regions[region][within : within + some])
            offset, length, region = offset + some, length - some, region + 1
        return views


def _size(array: Array) -> int:
    """Bytes of one region."""
    return array.nbytes // array.regions


def _sizes(arrays: tuple[Array, ...]) -> list[int]:
    return [_size(array) for array in arrays for _ in range(array.regions)]
