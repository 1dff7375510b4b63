"""Compare two layouts: how one pool's numbers become the other's, or why they cannot.

Pure and cached; touches no memory. `convert.py` and `digest.py` carry a plan out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

import msgspec

from transfer.errors import LayoutMismatch
from transfer.kernels import UNSCALED, Form
from transfer.layout import Axis, DType, KVLayout, Shard, read_axes
from transfer.rounding import KIND, SAME, TO_HALF, TO_INTERLEAVED

MAX_ROW_BYTES = 1 << 20
"""The smallest unit that is moved may not be larger than this."""

MAX_PLACES = 1 << 28
"""The most head vectors that a token may have over all layers."""

Pairing = Literal["half to interleaved", "interleaved to half"]
PAIRINGS: dict[Pairing | None, int] = {
    None: SAME,
    "half to interleaved": TO_INTERLEAVED,
    "interleaved to half": TO_HALF,
}


class Plan(msgspec.Struct, frozen=True, dict=True):
    """How numbers of the source pool become numbers of the target pool.

    `heads` are those of the model that are moved. `inner` are the innermost axes that are alike in
    both: one *row* is a run over them, contiguous on both sides, and everything is addressed in
    rows. `pairing` says how K (V has no positions in it) must be permuted within `dim`, if it
    must. `recode` is set where numbers get codes and scales anew; scales that go with unchanged
    codes are copied.
    """

    source: KVLayout
    target: KVLayout
    heads: Shard
    inner: tuple[Axis, ...]
    pairing: Pairing | None
    recode: bool

    @property
    def cast(self) -> tuple[DType, DType] | None:
        """From which to which type numbers are rounded; None where they are copied."""
        if self.source.dtype == self.target.dtype and not self.recode:
            return None
        return self.source.dtype, self.target.dtype

    @property
    def verbatim(self) -> bool:
        """Whether bytes are only put elsewhere: no number is rounded, none paired anew."""
        return self.cast is None and self.pairing is None

    @property
    def counts(self) -> dict[str, int]:
        """How many planes and heads are moved."""
        return {"kv": self.target.planes, "head": self.heads.count}

    @property
    def row_items(self) -> int:
        """Numbers in one row."""
        return _items(self.target, self.heads, self.inner)

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Length of a row, at the source and at the target."""
        items = self.row_items
        return items * self.source.item_bytes, items * self.target.item_bytes

    @property
    def token_bytes(self) -> int:
        """About how many bytes of the target one token takes in one layer."""
        target = self.target
        return target.planes * self.heads.count * target.head_dim * target.item_bytes

    @cached_property
    def form(self) -> Form:
        """The conversion of one number, as the kernels want it told."""
        source, target = self.source, self.target
        first, end = source.rotary or (0, source.head_dim)
        scaled = UNSCALED
        if self.recode and source.scales is not None:
            scaled = KIND[source.scales.dtype]
        return (
            PAIRINGS[self.pairing],
            KIND[source.dtype],
            KIND[target.dtype],
            target.head_dim,
            first,
            end,
            scaled,
            int(self.recode and target.scales is not None),
        )

    @property
    def run_bytes(self) -> int:
        """Length of the contiguous runs that one layer of a whole block makes in the target."""
        run: list[str] = []
        for axis in reversed(self.target.order):
            if axis in ("block", "layer", *self.target.apart):
                break
            run.append(axis)
            if axis == "head" and self.heads != self.target.heads:
                break
        return _items(self.target, self.heads, run) * self.target.item_bytes

    @property
    def line(self) -> str:
        """The plan in one printable line."""
        return f"{'; '.join(self._steps()) or 'copy as it is'}; runs of {self.run_bytes} bytes"

    def _steps(self) -> Iterator[str]:
        source, target = self.source, self.target
        if source.axes != target.axes:
            yield f"axes {source.axes} -> {target.axes}"
        if source.block_tokens != target.block_tokens:
            yield f"block {source.block_tokens} -> {target.block_tokens}"
        if self.heads != Shard(0, target.kv_heads):
            yield f"heads {self.heads.first} to {self.heads.end - 1} of {target.kv_heads}"
        if source.windows != target.windows:
            yield f"windows {_windows(source)} -> {_windows(target)}"
        if self.cast:
            yield f"dtype {_numbers(source)} -> {_numbers(target)}"
        if self.pairing:
            yield f"rope {self.pairing}"
        if source.weights != target.weights:
            yield f"UNLIKE WEIGHTS {source.weights} -> {target.weights}"


def _numbers(layout: KVLayout) -> str:
    if layout.scales is None:
        return layout.dtype
    groups = " ".join(read_axes(layout.scales.axes).axes)
    return f"{layout.dtype} (a {layout.scales.dtype} scale per {groups})"


def _windows(layout: KVLayout) -> str:
    kept = sorted(set(layout.windows or (0,)))
    return " or ".join(str(it) if it else "all" for it in kept)


@lru_cache(maxsize=1024)
def plan(
    source: KVLayout,
    target: KVLayout,
    *,
    allow_unlike_weights: bool = False,
    heads: Shard | None = None,
) -> Plan:
    """Answer how to convert `source` into `target`: what they share of `heads`, by default all.

    Raises:
        LayoutMismatch: they cannot be converted; names the first reason.
    """
    for name in ("model", "layers", "planes", "kv_heads", "head_dim", "rotary"):
        ours, theirs = getattr(source, name), getattr(target, name)
        if ours != theirs:
            raise LayoutMismatch(f"{name}: the source has {ours!r}, the target {theirs!r}")
    if not allow_unlike_weights:
        check_weights(source.weights, target.weights)
    _check_size(target)
    moved = _shared(source, target, heads or Shard(0, target.kv_heads))
    _check_windows(source, target)
    pairing = _pairing(source, target)
    recode = _recode(source, target, moved)
    inner = _inner(source, target, moved, alike_k_and_v=pairing is None)
    return Plan(source, target, moved, ("dim",) if recode else inner, pairing, recode)


def check_weights(source: str, target: str) -> None:
    """Refuse KV that other weights computed than those that read it.

    Raises:
        LayoutMismatch: they are unlike.
    """
    if source != target:
        raise LayoutMismatch(
            f"weights: the source has {source!r}, the target {target!r}, "
            "and unlike weights are not allowed"
        )


def _check_size(layout: KVLayout) -> None:
    vectors = layout.layers * layout.planes * layout.kv_heads
    if vectors > MAX_PLACES:
        raise LayoutMismatch(f"kv_heads: {vectors} vectors in a token, at most {MAX_PLACES}")
    if layout.head_dim * 4 > MAX_ROW_BYTES:
        raise LayoutMismatch(f"head_dim: {layout.head_dim} is more than a row may hold")


def _shared(source: KVLayout, target: KVLayout, wanted: Shard) -> Shard:
    """The heads that both have, of those that are wanted."""
    first = max(source.heads.first, target.heads.first, wanted.first)
    end = min(source.heads.end, target.heads.end, wanted.end)
    if first >= end:
        raise LayoutMismatch(
            f"shard: the source has heads {source.heads.first} to {source.heads.end - 1}, the "
            f"target {target.heads.first} to {target.heads.end - 1}, and none is to be moved"
        )
    return Shard(first, end - first)


def _check_windows(source: KVLayout, target: KVLayout) -> None:
    none = (0,) * source.layers
    pairs = zip(source.windows or none, target.windows or none, strict=True)
    for layer, (ours, theirs) in enumerate(pairs):
        if ours and not 0 < theirs <= ours:
            raise LayoutMismatch(
                f"windows: of layer {layer} the source keeps the last {ours} tokens, "
                f"the target needs {theirs or 'all'}"
            )


def _pairing(source: KVLayout, target: KVLayout) -> Pairing | None:
    if source.rope == target.rope:
        return None
    if source.planes == 1 and source.rotary is None:
        raise LayoutMismatch(
            f"rope: {source.rope!r} does not become {target.rope!r} "
            "in a latent of which nobody says what is rotary"
        )
    first, end = source.rotary or (0, source.head_dim)
    if (end - first) % 2:
        raise LayoutMismatch(
            f"rope: {source.rope!r} does not become {target.rope!r} "
            f"with an odd number of {end - first} rotary numbers"
        )
    return "half to interleaved" if source.rope == "half" else "interleaved to half"


def _recode(source: KVLayout, target: KVLayout, moved: Shard) -> bool:
    """Whether codes change: one side has scales, or both, but of another kind."""
    if source.scales is None and target.scales is None:
        return False
    groups = [_groups(it) for it in (source, target)]
    for side, layout, group in zip(("source", "target"), (source, target), groups, strict=True):
        if layout.scales is not None and "head" not in group and moved != layout.heads:
            raise LayoutMismatch(
                f"scales: one covers all {layout.heads.count} heads of the {side}, "
                f"of which {moved.count} are moved"
            )
    return source.dtype != target.dtype or groups[0] != groups[1]


def _groups(layout: KVLayout) -> frozenset[str]:
    """What tells two scales of a layout apart, with their dtype."""
    if layout.scales is None:
        return frozenset()
    axes, sizes = read_axes(layout.scales.axes).axes, layout.sizes(1)
    alone = {it for it in ("kv", "head") if it in axes or sizes.get(it, 1) == 1}
    return frozenset(alone | {layout.scales.dtype})


def _inner(
    source: KVLayout, target: KVLayout, moved: Shard, *, alike_k_and_v: bool
) -> tuple[Axis, ...]:
    """The innermost axes that both have in the same order, outermost of them first."""
    movable = {"dim", "head", "kv"} if alike_k_and_v else {"dim", "head"}
    movable -= {*source.apart, *target.apart}
    if not moved == source.heads == target.heads:
        movable -= {"kv"}  # from K to V there are heads in between that stay
    widest = max(source.item_bytes, target.item_bytes)
    inner: tuple[Axis, ...] = ()
    sides = [_spread(layout, moved) for layout in (source, target)]
    for ours, theirs in zip(*map(reversed, sides), strict=False):
        longer = (ours, *inner)
        fits = ours in movable and ours == theirs
        if not fits or _items(source, moved, longer) * widest > MAX_ROW_BYTES:
            break
        inner = longer
    return inner or ("dim",)


def _spread(layout: KVLayout, moved: Shard) -> list[Axis]:
    """The axes along which a prefix has more than one number to be moved, and `dim`."""
    counts = {"kv": layout.planes, "head": moved.count}
    return [axis for axis in layout.order if counts.get(axis, 2) > 1]


def _items(layout: KVLayout, moved: Shard, axes: Iterable[str]) -> int:
    sizes = {**layout.sizes(1), "head": moved.count}
    return prod(sizes[axis] for axis in axes)
