"""Pools for the contenders, touched before anything is timed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.bench.transfer.cases import Case, fill
from transfer.layout import KVLayout
from transfer.shared_memory import allocate


def source_pool(case: Case, layout: KVLayout) -> NDArray[np.uint8]:
    """A pool that holds the pattern."""
    pool = allocate(case.pool_bytes(layout))
    fill(pool)
    return pool


def target_pool(case: Case, layout: KVLayout) -> NDArray[np.uint8]:
    """A pool that holds something else."""
    pool = allocate(case.pool_bytes(layout))
    pool[:] = 0xEE
    return pool
