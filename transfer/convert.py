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
from transfer.kernels import COUNT, I64, TARGET, Form, Table, move, scratch_bytes
from transfer.layout import ITEM_BYTES, DType, Landing
from transfer.plan import Plan
from transfer.pool import Pool
from transfer.rows import Kind, Side, Walk, Walks, sides
from transfer.scaling import Scaling, scale_counts, scale_form, table_of

if TYPE_CHECKING:
    from transfer.digest import PrefixDigest

FRAME_BYTES = 1 << 20
"""About how much is converted at a time: what was gathered is still in cache when it is sent."""

FRAME_RUNS = 8192
"""The most runs that one frame names."""

WINDOW_BYTES = 256 << 10
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
        self._pool = Pool.of(source.layout, source.pool_blocks, source.pool)
        self._from = sides(
            source.layout, source.pool_blocks, source.blocks, source.tokens, plan.heads.first
        )
        self._to = _sides_of(landing, source.tokens, plan.heads.first)
        self._target_bytes = landing.pool_blocks * landing.layout.block_bytes
        self._source_scales = table_of(self._pool, self._from, 1)
        self._scaling: Scaling | None = None
        if plan.recode and plan.target.scales is not None:
            self._scaling = Scaling(plan, self._pool, self._from, source.tokens)
        numbers = landing.layout.tables(landing.pool_blocks)[0].nbytes
        self._legs = [self._numbers_leg(), *self._scales_leg(numbers)]
        self._scratch = np.empty(scratch_bytes(plan.row_items), np.uint8)
        self._stage = np.empty(0, np.uint8)
        self.tokens = source.tokens

    @property
    def verbatim(self) -> bool:
        """Whether the bytes of the source are those of the target, only elsewhere."""
        return self._plan.verbatim

    def frames(self, part: KVSlice) -> Iterator[Frame]:
        """Yield all of `part` that is kept, in pieces of about 1 MiB.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        start = self._first(part)
        if start >= part.end:
            return
        self._scale(part.layer, start, part.end)
        for leg in self._legs:
            way = leg.walks.over(start, part.end)
            shift = leg.start + part.layer * leg.target_step
            for staged in leg.staged(way):
                size = int(staged.lengths.sum())
                if self._stage.size < size:
                    self._stage = np.empty(max(size, min(FRAME_BYTES, 4 * size)), np.uint8)
                stage = (0, 0, np.array([self._stage.ctypes.data], np.int64))
                self._move(leg, way, staged.strips, part.layer, stage)
                yield Frame(part.layer, staged.offsets + shift, staged.lengths, self._stage[:size])

    def moves(self, part: KVSlice) -> tuple[I64, I64, I64]:
        """Addresses at the source, offsets at the target and lengths of the longest runs of `part`.

        Raises:
            ValueError: `part` is not a part of the prefix, or the conversion is not verbatim.
        """
        if not self.verbatim:
            raise ValueError(f"nothing can be moved as it is: {self._plan.line}")
        start = self._first(part)
        found = [(NOWHERE, NOWHERE, NOWHERE)]
        for leg, table, side in zip(self._legs, self._pool.tables, self._from, strict=True):
            if start < part.end:
                here, there, lengths = leg.walks.over(start, part.end).runs
                here = here + (table.start + part.layer * side.along("layer"))
                there = there + (leg.start + part.layer * leg.target_step)
                found.append((self._pool.addresses(here), there, lengths))
        if len(found) == 2:
            return found[1]
        here, there, lengths = (np.concatenate(it) for it in zip(*found, strict=True))
        return here, there, lengths

    def write(self, part: KVSlice, target: Pool, digest: PrefixDigest | None = None) -> None:
        """Put all of `part` where it belongs in `target`; add it to `digest` while it is hot.

        Raises:
            ValueError: `part` is not a part of the prefix, or `target` another pool than the
                landing's.
        """
        if target.nbytes != self._target_bytes:
            raise ValueError(f"pool: {target.nbytes} bytes, the landing's {self._target_bytes}")
        tokens = max(1, WINDOW_BYTES // self._plan.token_bytes)
        if digest is None:
            tokens = self.tokens
        for start in range(self._first(part), part.end, tokens):
            end = min(part.end, start + tokens)
            self._scale(part.layer, start, end)
            for leg, table in zip(self._legs, target.tables, strict=True):
                way = leg.walks.over(start, end)
                there = (table.region_bytes, leg.target_step, table.bases)
                self._move(leg, way, way.strips, part.layer, there)
            if digest is not None:
                digest.add(KVSlice(part.layer, start, end))

    def _first(self, part: KVSlice) -> int:
        """The first token of a slice that the target keeps."""
        check_part(part, self._plan.target.layers, self.tokens)
        return max(part.start, self._plan.target.kept(part.layer, self.tokens))

    def _scale(self, layer: int, start: int, end: int) -> None:
        if self._scaling is not None:
            self._scaling.fill(layer, start, end)

    def _move(self, leg: _Leg, way: Walk, strips: I64, layer: int, target: Table) -> None:
        """Where `target` has no region bytes, one strip after the other from its base on."""
        move(
            strips,
            way.steps,
            way.row_bytes,
            layer,
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


def _sides_of(landing: Landing, tokens: int, first_head: int) -> tuple[Side, ...]:
    """Where to write. A landing comes from another worker: what is wrong with it is not ours."""
    if landing.tokens != tokens:
        raise PeerMisbehaved(
            f"landing {landing.id}: tokens: {landing.tokens}, for a prefix of {tokens}"
        )
    try:
        return sides(landing.layout, landing.pool_blocks, landing.blocks, tokens, first_head)
    except ValueError as error:
        raise PeerMisbehaved(f"landing {landing.id}: {error}") from error


def rest_of(part: KVSlice, present: int) -> KVSlice | None:
    """What of a slice is beyond the first `present` tokens."""
    if part.start >= present:
        return part
    return KVSlice(part.layer, present, part.end) if part.end > present else None


def check_part(part: KVSlice, layers: int, tokens: int) -> None:
    """Refuse a slice that is not a part of the prefix.

    Raises:
        ValueError: names the field.
    """
    if not 0 <= part.layer < layers:
        raise ValueError(f"layer: {part.layer} is not one of {layers}")
    if not 0 <= part.start < part.end <= tokens:
        raise ValueError(
            f"start, end: {part.start} to {part.end} is not within a prefix of {tokens} tokens"
        )
