"""Which bytes of a pool a landing may be written to. Asked before anything is written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transfer.layout import Array, Landing
from transfer.walking import I64


class Bounds:
    """The blocks of a landing as sorted intervals, to look up many runs at once."""

    def __init__(self, landing: Landing) -> None:
        """Take note of the blocks that are awaited and of its heads, in each array of its pool.

        Raises:
            ValueError: as `heads_within`.
        """
        blocks = np.unique(np.asarray(landing.awaited, dtype=np.int64))
        heads = np.flatnonzero(np.diff(blocks, prepend=blocks[0] - 2) != 1)
        self._first: I64 = blocks[heads]
        self._end: I64 = blocks[np.append(heads[1:], len(blocks)) - 1] + 1
        self._pool_blocks = landing.pool_blocks
        self._arrays = landing.layout.tables(landing.pool_blocks)
        self._heads = heads_within(landing)
        self._shared = len(self._heads) < landing.layout.heads.count

    def first_outside(self, offsets: I64, lengths: I64) -> int | None:
        """Index of the first run that leaves the landing or a region, if there is one."""
        inside = np.zeros(len(offsets), np.bool_)
        start = 0
        for array in self._arrays:
            inside |= self._inside(array, offsets - start, lengths)
            start += array.nbytes
        wrong = np.flatnonzero(~inside)
        return int(wrong[0]) if len(wrong) else None

    def _inside(self, array: Array, offsets: I64, lengths: I64) -> NDArray[np.bool_]:
        """Which runs lie within the landing's blocks of one array, and within one region."""
        ends = offsets + lengths  # of what is absurdly long, negative
        inside = (offsets >= 0) & (lengths > 0) & (offsets < ends) & (ends <= array.nbytes)
        region = array.nbytes // array.regions
        inside &= offsets // region == (ends - 1) // region
        step = array.strides["block"]
        first = offsets // step
        count = (ends - 1) // step - first + 1
        number = first % self._pool_blocks
        interval = np.searchsorted(self._first, number, side="right") - 1
        inside &= (interval >= 0) & (number + count <= self._end[interval])
        return inside & self._of_its_heads(array, offsets, ends) if self._shared else inside

    def _of_its_heads(self, array: Array, offsets: I64, ends: I64) -> NDArray[np.bool_]:
        """Which runs touch no head but the landing's. What has no heads is everybody's."""
        if "head" not in array.sizes:
            return np.zeros(len(offsets), np.bool_)
        step = array.strides["head"]
        first, last = offsets // step, (ends - 1) // step
        head = first % array.sizes["head"]
        return (head >= self._heads.start) & (head + last - first < self._heads.stop)


def heads_within(landing: Landing) -> range:
    """Which of its pool's heads a landing is for.

    Raises:
        ValueError: they do not live there.
    """
    here, wanted = landing.layout.heads, landing.heads or landing.layout.heads
    if not here.first <= wanted.first < wanted.end <= here.end:
        raise ValueError(f"heads: {wanted} are not among {here}")
    return range(wanted.first - here.first, wanted.end - here.first)
