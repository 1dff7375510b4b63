"""Compare two layouts: how one pool's numbers become the other's, or why they cannot.

Pure and cached; touches no memory. `convert.py` and `digest.py` carry a plan out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

import msgspec

from transfer.errors import LayoutMismatch
from transfer.layout import ITEM_BYTES, Axis, DType, KVLayout
from transfer.rounding import KIND, SAME, TO_HALF, TO_INTERLEAVED

MAX_ROW_BYTES = 1 << 20
"""The smallest unit that is moved may not be larger than this."""

Pairing = Literal["half to interleaved", "interleaved to half"]


class Plan(msgspec.Struct, frozen=True, dict=True):
    """How numbers of the source pool become numbers of the target pool.

    `inner` are the innermost axes that are alike in both: one *row* is a run over them,
    contiguous on both sides, and everything is addressed in rows. `pairing` says how K (V has no
    positions in it) must be permuted within `dim`, if it must.
    """

    source: KVLayout
    target: KVLayout
    inner: tuple[Axis, ...]
    pairing: Pairing | None

    @property
    def cast(self) -> tuple[DType, DType] | None:
        """From which to which type numbers are rounded; None where they are copied."""
        if self.source.dtype == self.target.dtype:
            return None
        return self.source.dtype, self.target.dtype

    @property
    def row_items(self) -> int:
        """Numbers in one row."""
        return _items(self.target, self.inner)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Length of a row, at the source and at the target."""
        items = self.row_items
        return items * self.source.item_bytes, items * self.target.item_bytes

    @property
    def verbatim(self) -> bool:
        """Whether bytes are only put elsewhere: no number is rounded, none paired anew."""
        return self.cast is None and self.pairing is None

    @property
    def counts(self) -> dict[str, int]:
        """How many planes and heads there are."""
        return {"kv": 2, "head": self.target.kv_heads}

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token in one layer of the target."""
        return self.target.token_bytes // self.target.layers

    @property
    def scratch_bytes(self) -> int:
        """Room that the kernels need to convert one row."""
        return 0 if self.verbatim else 8 * self.row_items

    @cached_property
    def form(self) -> tuple[int, int, int, int, int, int]:
        """The conversion of one number, as the kernels want it told."""
        how = {None: SAME, "half to interleaved": TO_INTERLEAVED, "interleaved to half": TO_HALF}
        source, target = self.source, self.target
        return (
            how[self.pairing],
            KIND[source.dtype],
            source.item_bytes,
            KIND[target.dtype],
            target.item_bytes,
            target.head_dim,
        )

    @property
    def run_bytes(self) -> int:
        """Length of the contiguous runs that one layer of a whole block makes in the target."""
        run: list[str] = []
        for axis in reversed(self.target.order):
            if axis in ("block", "layer"):
                break
            run.append(axis)
        return _items(self.target, run) * self.target.item_bytes

    @property
    def line(self) -> str:
        """The plan in one printable line."""
        source, target = self.source, self.target
        steps = [] if source.axes == target.axes else [f"axes {source.axes} -> {target.axes}"]
        if source.block_tokens != target.block_tokens:
            steps.append(f"block {source.block_tokens} -> {target.block_tokens}")
        if self.cast:
            steps.append(f"dtype {source.dtype} -> {target.dtype}")
        if self.pairing:
            steps.append(f"rope {self.pairing}")
        if source.weights != target.weights:
            steps.append(f"UNLIKE WEIGHTS {source.weights} -> {target.weights}")
        return f"{'; '.join(steps) or 'copy as it is'}; runs of {self.run_bytes} bytes"


@lru_cache(maxsize=1024)
def plan(source: KVLayout, target: KVLayout, *, allow_unlike_weights: bool = False) -> Plan:
    """Answer how to convert `source` into `target`.

    Raises:
        LayoutMismatch: they cannot be converted; names the first reason.
    """
    for name in ("model", "layers", "kv_heads", "head_dim"):
        ours, theirs = getattr(source, name), getattr(target, name)
        if ours != theirs:
            raise LayoutMismatch(f"{name}: the source has {ours!r}, the target {theirs!r}")
    if source.weights != target.weights and not allow_unlike_weights:
        raise LayoutMismatch(
            f"weights: the source has {source.weights!r}, the target {target.weights!r}, "
            "and unlike weights are not allowed"
        )
    for side, layout in (("source", source), ("target", target)):
        if layout.dtype not in ITEM_BYTES:
            raise LayoutMismatch(f"dtype: the {side} has {layout.dtype!r}, which nobody converts")
    pairing = _pairing(source, target)
    return Plan(source, target, _inner(source, target, alike_k_and_v=pairing is None), pairing)


def _pairing(source: KVLayout, target: KVLayout) -> Pairing | None:
    if source.rope == target.rope:
        return None
    if source.head_dim % 2:
        raise LayoutMismatch(
            f"rope: {source.rope!r} does not become {target.rope!r} "
            f"with an odd head_dim of {source.head_dim}"
        )
    return "half to interleaved" if source.rope == "half" else "interleaved to half"


def _inner(source: KVLayout, target: KVLayout, *, alike_k_and_v: bool) -> tuple[Axis, ...]:
    """The innermost axes that both have in the same order, outermost of them first."""
    movable = {"dim", "head", "kv"} if alike_k_and_v else {"dim", "head"}
    widest = max(source.item_bytes, target.item_bytes)
    inner: tuple[Axis, ...] = ()
    for ours, theirs in zip(reversed(source.order), reversed(target.order), strict=True):
        longer = (ours, *inner)
        fits = ours in movable and ours == theirs
        if not fits or _items(source, longer) * widest > MAX_ROW_BYTES:
            break
        inner = longer
    if not inner:
        raise LayoutMismatch(f"head_dim: {source.head_dim} is more than a row may hold")
    return inner


def _items(layout: KVLayout, axes: Iterable[str]) -> int:
    sizes = layout.sizes(1)
    return prod(sizes[axis] for axis in axes)
