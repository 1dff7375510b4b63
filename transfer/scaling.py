"""Find the scales that numbers need to become codes; `layout.Scales` says how they are defined.

They are kept as float32 in a small table in canonical order, rounded as the target will keep them,
for one layer at a time. Both a conversion and a digest make their own.
"""

from __future__ import annotations

import numpy as np

from transfer.kernels import UNSCALED, Form, Table, find_scales, settle_scales
from transfer.layout import KVLayout, Order, read_axes
from transfer.plan import Plan
from transfer.pool import Pool
from transfer.rounding import KIND, SAME
from transfer.rows import Kind, Side, Walks
from transfer.walking import I64

FLOAT_BYTES = 4
ANYWHERE = 1 << 62
"""The region of what lies in one piece."""


def canonical(tokens: int, steps: dict[str, int]) -> Side:
    """A side without blocks, of one layer or all, where neighbours are as far apart as `steps`."""
    order = Order(("layer", "block", "token", "kv", "head"), ())
    zero: I64 = np.zeros(1, np.int64)
    return Side(order, {"block": 0, **steps}, 0, zero, tokens, ANYWHERE, ANYWHERE)


def scale_counts(plan: Plan, layout: KVLayout) -> dict[str, int]:
    """How many scales a token of one layer has along each axis, of those that are moved."""
    axes = read_axes(layout.scales.axes).axes if layout.scales is not None else ()
    return {axis: count if axis in axes else 1 for axis, count in plan.counts.items()}


def scale_form(source: str, target: str) -> Form:
    """How scales are converted, by their dtypes."""
    kinds = {str(dtype): kind for dtype, kind in KIND.items()}
    return SAME, kinds[source], kinds[target], 1, 0, 1, UNSCALED, 0


def table_of(pool: Pool, sides: tuple[Side, ...], number: int) -> Table:
    """One of a pool's arrays, for the kernels; the first where it has only that."""
    number = min(number, len(sides) - 1)
    table = pool.tables[number]
    return table.region_bytes, sides[number].along("layer"), table.bases


class Scaling:
    """The scales of one layer of a prefix that is encoded anew, as `plan` says."""

    def __init__(self, plan: Plan, pool: Pool, source: tuple[Side, ...], tokens: int) -> None:
        """Prepare for a prefix that lies in `pool` as `source` says."""
        assert plan.target.scales is not None
        counts = scale_counts(plan, plan.target)
        self._per_token = counts["kv"] * counts["head"]
        steps = {
            "token": self._per_token * FLOAT_BYTES,
            "kv": counts["head"] * FLOAT_BYTES if counts["kv"] > 1 else 0,
            "head": FLOAT_BYTES if counts["head"] > 1 else 0,
        }
        self.side = canonical(tokens, steps)
        self.scales = np.zeros(tokens * self._per_token, np.float32)
        self.address = self.scales.ctypes.data
        self.table: Table = (ANYWHERE, 0, np.array([self.address], np.int64))
        self._plan = plan
        self._numbers = table_of(pool, source, 0)
        self._source_scales = table_of(pool, source, 1)
        from_scales = source[1] if len(source) > 1 else None
        vector = plan.source.head_dim * plan.source.item_bytes
        kind = Kind(plan.counts, ("dim",), (FLOAT_BYTES, vector), (from_scales, self.side))
        self._walks = Walks(self.side, source[0], kind)
        self._scratch = np.zeros(12 * plan.source.head_dim + 64, np.uint8)

    def fill(self, layer: int, start: int, end: int) -> None:
        """Compute the scales of tokens `start` to `end` of a layer."""
        plan, scratch = self._plan, self._scratch.ctypes.data
        assert plan.target.scales is not None
        first = start * self._per_token
        count = end * self._per_token - first
        self.scales[first : first + count] = 0
        way = self._walks.over(start, end)
        find_scales(
            way.strips,
            way.steps,
            layer,
            self._numbers,
            self._source_scales,
            self.address,
            plan.form,
            scratch,
        )
        settle_scales(
            self.address + first * FLOAT_BYTES,
            count,
            KIND[plan.target.dtype],
            KIND[plan.target.scales.dtype],
            scratch,
        )
