"""What lies in a pool, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from transfer.pool import Pool


def cells(pool: Pool, blocks: Sequence[int] | None = None) -> Iterator[NDArray[np.uint8]]:
    """A copy of each array of a pool, as [block, layer, token, byte]: of all blocks, or of some."""
    first = 0
    for table in pool.layout.tables(pool.blocks):
        regions = pool.regions[first : first + table.regions]
        first += table.regions
        names = [str(axis) for axis in table.order.axes]
        flat = regions[0] if len(regions) == 1 else np.concatenate(regions)
        whole = flat.reshape([*table.sizes.values(), table.item_bytes])
        leading = [names.index(axis) for axis in ("block", "layer", "token")]
        others = [axis for axis in range(whole.ndim) if axis not in leading]
        moved = whole.transpose([*leading, *others])
        taken = moved.copy() if blocks is None else moved[list(blocks)]
        yield np.ascontiguousarray(taken).reshape(*taken.shape[:3], -1)
