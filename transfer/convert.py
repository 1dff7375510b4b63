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
from transfer.kernels import COUNT, I64, TARGET, move
from transfer.layout import Landing
from transfer.plan import Plan
from transfer.pool import Pool
from transfer.rows import Side, Walk, Walks

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


class _Staged(msgspec.Struct, frozen=True, eq=False):
    """The part of a walk that fills one frame; the same for every layer but for a constant."""

    strips: I64
    offsets: I64
    lengths: I64


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
        self._from = Side.of(source.layout, source.pool_blocks, source.blocks, source.tokens)
        self._to = _side_of(landing, source.tokens)
        self._target_bytes = landing.pool_blocks * landing.layout.block_bytes
        self._scratch = np.empty(plan.scratch_bytes, np.uint8)
        self._stage = np.empty(0, np.uint8)
        self._walks = Walks(self._from, self._to, plan.counts, plan.inner, plan.row_bytes)
        self._staged: tuple[Walk, list[_Staged]] | None = None
        self.tokens = source.tokens

    @property
    def verbatim(self) -> bool:
        """Whether the bytes of the source are those of the target, only elsewhere."""
        return self._plan.verbatim

    def frames(self, part: KVSlice) -> Iterator[Frame]:
        """Yield all of `part` in pieces of about 1 MiB.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        way = self._way(part)
        if self._staged is None or self._staged[0] is not way:
            self._staged = way, list(_cut(way))
        step = part.layer * self._to.step["layer"]
        for staged in self._staged[1]:
            size = int(staged.lengths.sum())
            if self._stage.size < size:
                self._stage = np.empty(max(size, min(FRAME_BYTES, 4 * size)), np.uint8)
            base = np.array([self._stage.ctypes.data], np.int64)
            self._move(way, staged.strips, part.layer, base, 0)
            yield Frame(part.layer, staged.offsets + step, staged.lengths, self._stage[:size])

    def moves(self, part: KVSlice) -> tuple[I64, I64, I64]:
        """Addresses at the source, offsets at the target and lengths of the longest runs of `part`.

        Raises:
            ValueError: `part` is not a part of the prefix, or the conversion is not verbatim.
        """
        if not self.verbatim:
            raise ValueError(f"nothing can be moved as it is: {self._plan.line}")
        source, target, lengths = self._way(part).runs
        here = self._pool.addresses(source + part.layer * self._from.step["layer"])
        return here, target + part.layer * self._to.step["layer"], lengths

    def write(self, part: KVSlice, target: Pool, digest: PrefixDigest | None = None) -> None:
        """Put all of `part` where it belongs in `target`; add it to `digest` while it is hot.

        Raises:
            ValueError: `part` is not a part of the prefix, or `target` another pool than the
                landing's.
        """
        if target.nbytes != self._target_bytes:
            raise ValueError(f"pool: {target.nbytes} bytes, the landing's {self._target_bytes}")
        check_part(part, self._plan.target.layers, self.tokens)  # before its first window
        tokens = max(1, WINDOW_BYTES // self._plan.layer_token_bytes)
        if digest is None:
            tokens = self.tokens
        for start in range(part.start, part.end, tokens):
            window = KVSlice(part.layer, start, min(part.end, start + tokens))
            way = self._way(window)
            self._move(way, way.strips, part.layer, target.bases, target.region_bytes)
            if digest is not None:
                digest.add(window)

    def _move(self, way: Walk, strips: I64, layer: int, bases: I64, region_bytes: int) -> None:
        """Without `region_bytes`, one strip after the other into the memory at `bases`."""
        move(
            strips,
            way.steps,
            way.row_bytes,
            layer,
            layer + 1,
            (self._pool.region_bytes, self._from.step["layer"]),
            (region_bytes, self._to.step["layer"]),
            self._pool.bases,
            bases,
            self._plan.form,
            self._scratch.ctypes.data,
        )

    def _way(self, part: KVSlice) -> Walk:
        check_part(part, self._plan.target.layers, self.tokens)
        return self._walks.over(part.start, part.end)


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


def _side_of(landing: Landing, tokens: int) -> Side:
    """Where to write. A landing comes from another worker: what is wrong with it is not ours."""
    if landing.tokens != tokens:
        raise PeerMisbehaved(
            f"landing {landing.id}: tokens: {landing.tokens}, for a prefix of {tokens}"
        )
    try:
        return Side.of(landing.layout, landing.pool_blocks, landing.blocks, tokens)
    except ValueError as error:
        raise PeerMisbehaved(f"landing {landing.id}: {error}") from error


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
