"""The nouns of the data plane: how a pool is cut, and where a handoff may be written.

Nothing here moves a byte or knows an accelerator; `plan.py` compares two layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import Annotated, Literal, cast

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]

DType = Literal["float32", "float16", "bfloat16", "float8_e4m3", "int8"]
ScaleDType = Literal["float32", "float16", "bfloat16"]
Axis = Literal["layer", "kv", "block", "head", "token", "dim"]

AXES: frozenset[str] = frozenset({"layer", "kv", "block", "head", "token", "dim"})
ITEM_BYTES: dict[DType, int] = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "int8": 1,
}  # fmt: skip


SCALE_AXES = AXES - {"dim"}


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Which of a model's KV heads live in one pool: `count` of them, from `first` on.

    Two shards with the same heads are replicas.
    """

    first: Natural
    count: Positive

    @property
    def end(self) -> int:
        """The first head after these."""
        return self.first + self.count


class Scales(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the codes of a pool are multiplied with: value = code * scale, in float32.

    The scales are an array of their own, in regions of their own, behind the last of the numbers.
    `axes` names its dimensions, outermost first, perhaps with a bar, as in `KVLayout.axes`. There
    is one scale for each combination of them; numbers that differ only along an axis that is left
    out share theirs. `layer`, `block` and `token` are never left out, for a token's numbers are
    final before those of the next are known; `head` and `kv` may be, `dim` always is.

    Numbers become codes deterministically: scale = largest magnitude / 127 (int8) or 448
    (float8_e4m3), divided in float32 and rounded to `dtype`; code = value / scale, divided in
    float32, rounded to nearest (ties to even) and limited to the largest code. Where the scale
    comes out as zero, so do the codes; a group that holds a NaN or an infinity, or whose scale is
    too large for `dtype`, gets the scale NaN and zeros.
    """

    axes: Annotated[str, msgspec.Meta(max_length=64)]
    dtype: ScaleDType = "float32"


class Order(msgspec.Struct, frozen=True):
    """The dimensions of an array: all of them, and those before the bar, outermost first."""

    axes: tuple[Axis, ...]
    apart: tuple[Axis, ...]


class Array(msgspec.Struct, frozen=True, dict=True):
    """One of the arrays that a pool consists of: the lengths of its axes, the bytes of an item."""

    order: Order
    sizes: dict[str, int]
    item_bytes: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.sizes.values()) * self.item_bytes

    @cached_property
    def regions(self) -> int:
        """Regions in which it lies, all of one size."""
        return prod(self.sizes[axis] for axis in self.order.apart)

    @cached_property
    def strides(self) -> dict[str, int]:
        """How many bytes apart two neighbours along each axis lie."""
        apart: dict[str, int] = {}
        step = self.item_bytes
        for axis in reversed(self.order.axes):
            apart[axis] = step
            step *= self.sizes[axis]
        return apart


def read_axes(text: str) -> Order:
    """Read `"layer kv | block token head dim"`.

    Raises:
        ValueError: an unknown or repeated word, or a bar that is not between two of them.
    """
    before, bar, after = text.partition("|")
    words = (*before.split(), *after.split())
    if len(set(words)) != len(words) or not AXES.issuperset(words):
        raise ValueError(f"axes: they are {sorted(AXES)}, each at most once; got {text!r}")
    if bar and not (before.split() and after.split()):
        raise ValueError(f"axes: a bar stands between two of them; got {text!r}")
    order = cast("tuple[Axis, ...]", words)
    return Order(order, order[: len(before.split())] if bar else ())


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """How one worker cuts its pool into blocks, precisely enough for a stranger to read it.

    The pool is one array whose dimensions `axes` names, outermost first; `block` is the block
    number, `token` the place inside a block, `kv` is K then V. A bar, as in
    `"layer kv | block token head dim"`, says that the array lies in pieces: for each combination
    of the dimensions before it there is one *region*, contiguous in itself, and they are numbered
    in order. Without a bar there is one region. Offsets count through all regions as if they lay
    one after the other; `pool.py` knows where they really are.

    `model` identifies the checkpoint (architecture, RoPE parameters, vocabulary, original
    weights); two pools of unlike `model` never meet. `weights` says how this engine's copy of
    them is kept ("float32", "bfloat16", "q4_1", ...).

    `planes` is 2 for K and V. It is 1 for a latent (MLA), which has one head of `head_dim`
    numbers; `axes` may then leave out `kv` and `head`. `rotary` are the first of the numbers of a
    head that positions rotate and the end of them, if those are not all; `rope` says how pairs of
    them lie, as two halves or side by side.

    `kv_heads` is how many heads the model has, `shard` which of them live here, if not all.
    `windows` says of each layer how many last tokens of a sequence it keeps, 0 for all of them;
    nothing is said of older ones, though they have their places. Empty: every layer keeps all.

    `int8` needs `scales`, `float8_e4m3` (the finite one, NaN but no infinity) may have them; a
    number too large for it becomes the largest. All other dtypes have none.
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    weights: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    dtype: DType
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)]
    rope: Literal["half", "interleaved"]
    axes: Annotated[str, msgspec.Meta(max_length=64)] = "block layer kv head token dim"
    planes: Literal[1, 2] = 2
    shard: Shard | None = None
    windows: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=4096)] = ()
    rotary: tuple[Natural, Natural] | None = None
    scales: Scales | None = None

    def __post_init__(self) -> None:
        self._check_order("axes", self._numbers, AXES)
        if self._numbers.axes[-1] != "dim":
            raise ValueError(f"axes: the innermost must be dim; got {self.axes!r}")
        if self.shard is not None and self.shard.end > self.kv_heads:
            raise ValueError(f"shard: heads up to {self.shard.end}, of {self.kv_heads}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows: {len(self.windows)} of them, for {self.layers} layers")
        if self.rotary is not None and not (0 <= self.rotary[0] < self.rotary[1] <= self.head_dim):
            raise ValueError(f"rotary: {self.rotary} is no part of a head of {self.head_dim}")
        if self.scales is None:
            if self.dtype == "int8":
                raise ValueError("scales: int8 needs them")
            return
        if self.dtype not in ("int8", "float8_e4m3"):
            raise ValueError(f"scales: {self.dtype} has none")
        self._check_order("scales.axes", read_axes(self.scales.axes), SCALE_AXES)

    def _check_order(self, field: str, order: Order, most: frozenset[str]) -> None:
        optional = {"kv"} if self.planes == 1 else set()
        if self.kv_heads == 1:
            optional.add("head")
        if most is SCALE_AXES:
            optional = {"kv", "head"}
        if not most - optional <= set(order.axes) <= most:
            raise ValueError(
                f"{field}: must name each of {sorted(most - optional)} once, outermost first, "
                f"and may name {sorted(optional)}; got {order.axes}"
            )

    @cached_property
    def _numbers(self) -> Order:
        return read_axes(self.axes)

    @property
    def order(self) -> tuple[Axis, ...]:
        """The axes, outermost first, without the bar."""
        return self._numbers.axes

    @property
    def apart(self) -> tuple[Axis, ...]:
        """The axes before the bar: each combination of them is a region. None without a bar."""
        return self._numbers.apart

    @property
    def heads(self) -> Shard:
        """The heads that live here."""
        return self.shard or Shard(0, self.kv_heads)

    def tables(self, pool_blocks: int) -> tuple[Array, ...]:
        """The arrays of a pool of `pool_blocks` blocks: the numbers, then the scales, if any."""
        kept: tuple[int, tuple[Array, ...]] | None = self.__dict__.get("_tables")
        if kept is None or kept[0] != pool_blocks:  # mostly asked for one and the same pool
            kept = self.__dict__["_tables"] = pool_blocks, tuple(self._arrays(pool_blocks))
        return kept[1]

    def _arrays(self, pool_blocks: int) -> Iterator[Array]:
        sizes = self.sizes(pool_blocks)
        yield Array(self._numbers, sizes, self.item_bytes)
        if self.scales is not None:
            order = read_axes(self.scales.axes)
            lengths = {str(axis): sizes.get(axis, 1) for axis in order.axes}
            yield Array(order, lengths, ITEM_BYTES[self.scales.dtype])

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def token_bytes(self) -> int:
        """Bytes that one token's KV takes over all layers, with its scales."""
        return sum(table.nbytes for table in self.tables(1)) // self.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes over all layers."""
        return self.token_bytes * self.block_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that are equal exactly when the layouts are."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def sharded(self, shards: tuple[Shard, ...]) -> tuple[KVLayout, ...]:
        """How the pools are cut that have these heads each; this one where there are none.

        Raises:
            ValueError: a shard is not among the heads.
        """
        if not shards:
            return (self,)
        return tuple(msgspec.structs.replace(self, shard=it) for it in shards)

    def kept(self, layer: int, tokens: int) -> int:
        """The first token of a prefix of `tokens` tokens that `layer` keeps."""
        window = self.windows[layer] if self.windows else 0
        return max(0, tokens - window) if window else 0

    def sizes(self, pool_blocks: int) -> dict[str, int]:
        """The length of each axis in a pool of `pool_blocks` blocks, in the order of `axes`."""
        lengths: dict[str, int] = {
            "layer": self.layers,
            "kv": self.planes,
            "block": pool_blocks,
            "head": self.heads.count,
            "token": self.block_tokens,
            "dim": self.head_dim,
        }
        return {axis: lengths[axis] for axis in self.order}


class Epoch(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Who holds a right, in order of time: the worker's start, then its count of rights given."""

    incarnation: Natural
    counter: Natural


class Endpoint(msgspec.Struct, frozen=True):
    """Where a transport can be reached: `tcp` with `host:port`, `memory` with a name.

    `shard` says which of its worker's pools is behind it, where they are several. Where codes are
    taken (see `coding.py`), `decodes_per_second` is how many numbers its worker makes of them.
    """

    transport: Annotated[str, msgspec.Meta(max_length=32)]
    address: Annotated[str, msgspec.Meta(max_length=512)]
    shard: Natural = 0
    decodes_per_second: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one pool of the source writes into one pool of the target: `heads` of a landing.

    Pools are named by their number on either side; `shard` are all the heads of the target's, None
    where it has every one. `secret` is the part's own.
    """

    source: Natural
    target: Natural
    shard: Shard | None
    heads: Shard
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]


class Landing(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks that a decode worker has set aside for one handoff, and the right to write there.

    `blocks` hold `tokens` tokens in their order. `secret` is random, known only to those who
    were given the landing, and shown with every write. `lease_seconds` counts from the moment
    the landing was granted or last written to. `heads` are the only ones that it is for, where the
    others of its pool come through landings of their own. Where either side has several pools, the
    landing is in `parts`, and `layout` speaks of all of the target's pools together (see
    `sharded.py`). The KV of the first `present` tokens, whole blocks and not all there are, lies
    there already: it is not written.
    """

    id: Annotated[str, msgspec.Meta(max_length=64)]
    epoch: Epoch
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    worker: Annotated[str, msgspec.Meta(max_length=128)]
    endpoints: tuple[Endpoint, ...]
    layout: KVLayout
    pool_blocks: Positive
    blocks: tuple[Natural, ...]
    tokens: Positive
    lease_seconds: float
    heads: Shard | None = None
    present: Natural = 0
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=4096)] = ()

    @property
    def awaited(self) -> tuple[int, ...]:
        """The blocks that are to be written to."""
        return self.blocks[self.present // self.layout.block_tokens :]

    @property
    def place(self) -> bytes:
        """Sixteen bytes that are equal exactly when two landings are for the same memory."""
        layout = self.layout.fingerprint
        where = (layout, self.pool_blocks, self.blocks, self.tokens, self.heads, self.present)
        return hashlib.sha256(msgspec.msgpack.encode(where)).digest()[:16]
