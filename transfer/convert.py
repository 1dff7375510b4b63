"""Read slices of a prefix out of the sender's pool, as the target wants them.

`Conversion.frames` stages bytes to be sent, `write` puts them straight into memory that both ends
can reach, and where a conversion is `verbatim`, `moves` says what may be copied or sent from where
it lies. Sends nothing; every transport uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.contract import KVSlice, Source
from transfer.errors import PeerMisbehaved
from transfer.kernels import Form, Table, move, scratch_bytes
from transfer.layout import ITEM_BYTES, DType, Landing
from transfer.plan import Plan
from transfer.pool import Pool
from transfer.rows import Kind, Side, Walk, Walks, sides
from transfer.scaling import Scaling, scale_counts, scale_form, table_of
from transfer.walking import COUNT, I64, TARGET

if TYPE_CHECKING:
    from transfer.digest import PrefixDigest

FRAME_BYTES = 1 << 20
"""About how much is converted at a time: what was gathered is still in cache when it is sent."""

FRAME_RUNS = 8192
"""The most runs that one frame names."""

WINDOW_BYTES = 512 << 10
"""About how much is written before it is read again for the digest, while it is in the cache."""


class Frame(msgspec.Struct, frozen=True, eq=False):
    """Bytes for one layer of the target pool: `data` is cut into runs `(offset, length)`.

    `data` is a view of scratch memory, valid until the next frame is asked for.
    """

    layer: int
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    data: NDArray[np.uint8]


Tamper = Callable[[str, Frame], Frame | None]
"""For drills: sees each frame of a landing before it is sent and may damage or drop it."""

TamperNote = Callable[[bytes], bytes]
"""For drills: sees each note after it was sealed and may damage it."""


class _Staged(msgspec.Struct, frozen=True, eq=False):
    """The part of a walk that fills one frame; the same for every layer but for a constant."""

    strips: I64
    offsets: I64
    lengths: I64


class _Leg:
    """The way of one of a pool's arrays: its numbers, or its scales."""

    def __init__(self, walks: Walks, source: Table, target: Side, start: int, form: Form) -> None:
        self.walks = walks
        self.source = source
        self.target_step = target.along("layer")
        self.start = start
        self.form = form
        self._staged: tuple[Walk | None, list[_Staged]] = (None, [])

    def staged(self, way: Walk) -> list[_Staged]:
        """A walk in frames; kept, as the next layer usually asks the same."""
        if self._staged[0] is not way:
            self._staged = way, list(_cut(way))
        return self._staged[1]


class Conversion:
    """One prefix on its way into one landing."""

    def __init__(self, plan: Plan, source: Source, landing: Landing) -> None:
        """Prepare; touches no memory of the pool.

        Raises:
            ValueError: pool, blocks and tokens of the source contradict each other.
            PeerMisbehaved: those of the landing do, or it is for another number of tokens.
        """
        self._plan = plan
        self._pool = Pool.of(plan.source, source.pool_blocks, source.pool)
        self._from = sides(
            plan.source, source.pool_blocks, source.blocks, source.tokens, plan.heads.first
        )
        self._to = _sides_of(plan, landing, source.tokens)
        self._target_bytes = landing.pool_blocks * plan.target.block_bytes
        self._source_scales = table_of(self._pool, self._from, 1)
        self._scaling: Scaling | None = None
        if plan.recode and plan.target.scales is not None:
            self._scaling = Scaling(plan, self._pool, self._from, source.tokens)
        numbers = plan.target.tables(landing.pool_blocks)[0].nbytes
        self._legs = [self._numbers_leg(), *self._scales_leg(numbers)]
        self._scratch = np.empty(scratch_bytes(plan.row_items), np.uint8)
        self._stage = np.empty(0, np.uint8)
        self.tokens = source.tokens

    @property
    def verbatim(self) -> bool:
        """Whether the bytes of the source are those of the target, only elsewhere."""
        return self._plan.verbatim

    def frames(self, part: KVSlice) -> Iterator[Frame]:
        """Yield all of `part` that is kept, layer by layer, in pieces of about 1 MiB.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        for some in self.kept(part):
            for layer in range(some.layer, some.layer + some.layers):
                yield from self._frames(KVSlice(layer, some.start, some.end))

    def _frames(self, part: KVSlice) -> Iterator[Frame]:
        self._scale(part)
        for leg in self._legs:
            way = leg.walks.over(part.start, part.end)
            shift = leg.start + part.layer * leg.target_step
            for staged in leg.staged(way):
                size = int(staged.lengths.sum())
                if self._stage.size < size:
                    self._stage = np.empty(max(size, min(FRAME_BYTES, 4 * size)), np.uint8)
                stage = (0, 0, np.array([self._stage.ctypes.data], np.int64))
                self._move(leg, way, staged.strips, part, stage)
                yield Frame(part.layer, staged.offsets + shift, staged.lengths, self._stage[:size])

    def moves(self, part: KVSlice) -> tuple[I64, I64, I64]:
        """Addresses at the source, offsets at the target and lengths of the longest runs of `part`.

        In the order in which `fill` puts their bytes.

        Raises:
            ValueError: `part` is not a part of the prefix, or the conversion is not verbatim.
        """
        if not self.verbatim:
            raise ValueError(f"nothing can be moved as it is: {self._plan.line}")
        found = []
        for some in self.kept(part):
            layers = np.arange(some.layer, some.layer + some.layers)[:, None]
            for leg, table, side in zip(self._legs, self._pool.tables, self._from, strict=True):
                here, there, lengths = leg.walks.over(some.start, some.end).runs
                here = here + (layers * side.along("layer") + table.start)
                there = there + (layers * leg.target_step + leg.start)
                all_lengths = np.broadcast_to(lengths, here.shape).ravel()
                found.append((self._pool.addresses(here.ravel()), there.ravel(), all_lengths))
        if len(found) == 1:
            return found[0]
        found.append((NOWHERE, NOWHERE, NOWHERE))
        here, there, lengths = (np.concatenate(it) for it in zip(*found, strict=True))
        return here, there, lengths

    def run_bytes(self, part: KVSlice) -> float:
        """How long the runs of `moves` are, on average; raises as `moves`."""
        if not self.verbatim:
            raise ValueError(f"nothing can be moved as it is: {self._plan.line}")
        ways = [
            leg.walks.over(some.start, some.end) for some in self.kept(part) for leg in self._legs
        ]
        return sum(it.nbytes for it in ways) / sum(len(it.runs[0]) for it in ways)

    def write(self, part: KVSlice, target: Pool, digest: PrefixDigest | None = None) -> None:
        """Put all of `part` where it belongs in `target`; add it to `digest` while it is hot.

        Raises:
            ValueError: `part` is not a part of the prefix, or `target` another pool than the
                landing's.
        """
        if target.nbytes != self._target_bytes:
            raise ValueError(f"pool: {target.nbytes} bytes, the landing's {self._target_bytes}")
        for some in [part] if digest is None else self.windows(part, WINDOW_BYTES):
            if digest is not None:
                digest.add(some)
            for kept in self.kept(some):
                self._scale(kept)
                for leg, table in zip(self._legs, target.tables, strict=True):
                    way = leg.walks.over(kept.start, kept.end)
                    there = (table.region_bytes, leg.target_step, table.bases)
                    self._move(leg, way, way.strips, kept, there)

    def size(self, part: KVSlice) -> int:
        """Bytes of the target that make up `part`; raises as `kept`."""
        return sum(
            leg.walks.over(some.start, some.end).nbytes * some.layers
            for some in self.kept(part)
            for leg in self._legs
        )

    def fill(self, part: KVSlice, address: int) -> None:
        """Convert all of `part` to `address` on, without gaps; `size` says how much that is.

        Layer by layer, numbers before scales, each in the order of the target's memory: whoever
        knows the landing knows where each byte belongs.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        for some in self.kept(part):
            self._scale(some)
            for leg in self._legs:
                way = leg.walks.over(some.start, some.end)
                self._move(leg, way, way.strips, some, (0, 0, np.array([address], np.int64)))
                address += way.nbytes * some.layers

    def windows(self, part: KVSlice, most: int) -> Iterator[KVSlice]:
        """Cut a slice into smaller ones of about `most` bytes of the target, at least one token."""
        layer_bytes = (part.end - part.start) * self._plan.token_bytes
        last = part.layer + part.layers
        if layer_bytes <= most:
            step = most // layer_bytes
            for layer in range(part.layer, last, step):
                yield KVSlice(layer, part.start, part.end, min(step, last - layer))
            return
        step = max(1, most // self._plan.token_bytes)
        grid = max(self._plan.source.block_tokens, self._plan.target.block_tokens)
        step = max(1, step // grid) * grid if step >= grid else step
        for layer in range(part.layer, last):
            start = part.start
            while start < part.end:
                end = min(part.end, (start + step) // step * step)
                yield KVSlice(layer, start, end)
                start = end

    def kept(self, part: KVSlice) -> Iterator[KVSlice]:
        """What the target keeps of `part`, as slices of layers that go together.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        return kept(self._plan, part, self.tokens)

    def _scale(self, part: KVSlice) -> None:
        if self._scaling is not None:
            self._scaling.fill(part.layer, part.start, part.end)

    def _move(self, leg: _Leg, way: Walk, strips: I64, part: KVSlice, target: Table) -> None:
        """Where `target` has no region bytes, one strip after the other from its base on."""
        move(
            strips,
            way.steps,
            way.row_bytes,
            part.layer,
            part.layer + part.layers,
            leg.source,
            target,
            self._source_scales,
            self._scaling.address if self._scaling is not None else 0,
            leg.form,
            self._scratch.ctypes.data,
        )

    def _numbers_leg(self) -> _Leg:
        plan = self._plan
        from_scales = self._from[1] if len(self._from) > 1 else None
        to_scales = self._scaling.side if self._scaling is not None else None
        kind = Kind(plan.counts, plan.inner, plan.row_bytes, (from_scales, to_scales))
        walks = Walks(self._from[0], self._to[0], kind)
        return _Leg(walks, table_of(self._pool, self._from, 0), self._to[0], 0, plan.form)

    def _scales_leg(self, start: int) -> Iterator[_Leg]:
        """Where the target has scales: from those of the source, or from those just found."""
        plan, ours, theirs = self._plan, self._plan.source.scales, self._plan.target.scales
        if theirs is None:
            return
        dtype: DType
        if self._scaling is not None:
            source, table, dtype = self._scaling.side, self._scaling.table, "float32"
        else:
            assert ours is not None  # or codes would have to be found
            source, table, dtype = self._from[1], self._source_scales, ours.dtype
        row_bytes = ITEM_BYTES[dtype], ITEM_BYTES[theirs.dtype]
        kind = Kind(scale_counts(plan, plan.target), (), row_bytes)
        walks = Walks(source, self._to[1], kind)
        yield _Leg(walks, table, self._to[1], start, scale_form(dtype, theirs.dtype))


NOWHERE: I64 = np.zeros(0, np.int64)


def _cut(way: Walk) -> Iterator[_Staged]:
    """Cut a walk into frames."""
    strip_bytes = way.strips[:, COUNT] * way.row_bytes[TARGET]
    joined = way.steps[TARGET] == way.row_bytes[TARGET]
    runs = np.ones_like(strip_bytes) if joined else way.strips[:, COUNT]
    # What a frame takes of its bytes and of its runs, whichever is more.
    taken = np.cumsum(np.maximum(strip_bytes * FRAME_RUNS, runs * FRAME_BYTES))
    first, before = 0, 0
    while first < len(taken):
        end = int(np.searchsorted(taken, before + FRAME_BYTES * FRAME_RUNS, side="right"))
        end = max(first + 1, end)
        part = msgspec.structs.replace(way, strips=way.strips[first:end])
        yield _Staged(part.strips, *part.target_runs)
        first, before = end, int(taken[end - 1])


def _sides_of(plan: Plan, landing: Landing, tokens: int) -> tuple[Side, ...]:
    """Where to write. A landing comes from another worker: what is wrong with it is not ours."""
    if landing.tokens != tokens:
        raise PeerMisbehaved(
            f"landing {landing.id}: tokens: {landing.tokens}, for a prefix of {tokens}"
        )
    try:
        return sides(plan.target, landing.pool_blocks, landing.blocks, tokens, plan.heads.first)
    except ValueError as error:
        raise PeerMisbehaved(f"landing {landing.id}: {error}") from error


def rest_of(part: KVSlice, present: int) -> KVSlice | None:
    """What of a slice is beyond the first `present` tokens."""
    if part.start >= present:
        return part
    return KVSlice(part.layer, present, part.end, part.layers) if part.end > present else None


def kept(plan: Plan, part: KVSlice, tokens: int) -> Iterator[KVSlice]:
    """What a plan's target keeps of `part`, as slices of layers that can be dealt with at once.

    Scales are found, and follow the numbers, one layer at a time.

    Raises:
        ValueError: `part` is not a part of a prefix of so many tokens.
    """
    check_part(part, plan.target.layers, tokens)
    if plan.target.scales is None and not plan.target.windows:
        yield part
        return
    for layer in range(part.layer, part.layer + part.layers):
        start = max(part.start, plan.target.kept(layer, tokens))
        if start < part.end:
            yield KVSlice(layer, start, part.end)


def check_part(part: KVSlice, layers: int, tokens: int) -> None:
    """Refuse a slice that is not a part of the prefix.

    Raises:
        ValueError: names the field.
    """
    if not 0 <= part.layer < part.layer + part.layers <= layers:
        last = part.layer + part.layers - 1
        raise ValueError(f"layer: {part.layer} to {last} is not within {layers} layers")
    if not 0 <= part.start < part.end <= tokens:
        raise ValueError(
            f"start, end: {part.start} to {part.end} is not within a prefix of {tokens} tokens"
        )
