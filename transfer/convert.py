"""Read slices of a prefix out of the sender's pool as bytes in the target's order.

Produces frames: contiguous runs of the target pool and the bytes that belong there. Sends
nothing; every transport uses it. Start with `Conversion.frames`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.contract import KVSlice, Source
from transfer.errors import PeerMisbehaved
from transfer.layout import Axis, Landing
from transfer.plan import Plan
from transfer.rounding import cast, pair
from transfer.rows import WORD, Addresses, Rows, Words, table

FRAME_BYTES = 1 << 20
"""About how much is converted at a time: what was gathered is still in cache when it is sent."""

FRAME_RUNS = 8192
"""The most runs that one frame names."""

CACHED_ROWS = 1 << 20
"""Row numbers of a slice are kept for the next layers up to this many; 16 bytes each."""


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


class _Piece(msgspec.Struct, frozen=True, eq=False):
    """A part of a slice, the same for every layer but for a constant."""

    source: Rows
    keys: NDArray[np.bool_] | None
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


class Conversion:
    """One prefix on its way into one landing."""

    def __init__(self, plan: Plan, source: Source, landing: Landing) -> None:
        """Prepare; touches no memory of the pool.

        Raises:
            ValueError: pool, blocks and tokens of the source contradict each other.
            PeerMisbehaved: those of the landing do, or it is for another number of tokens.
        """
        inner = plan.inner
        self._plan = plan
        self._rows = table(source.pool, source.layout, source.pool_blocks, inner)
        self._from = Addresses(
            source.layout, source.pool_blocks, source.blocks, source.tokens, inner
        )
        self._to = _addresses_of(landing, source.tokens, inner)
        self._row_bytes = plan.row_items * plan.target.item_bytes
        self._frame_rows = max(1, min(FRAME_BYTES // self._row_bytes, FRAME_RUNS))
        self._scratch = np.empty(
            (self._frame_rows, plan.row_items), dtype=WORD[plan.source.item_bytes]
        )
        self._cached: tuple[int, int] = (0, 0)
        self._pieces: list[_Piece] = []
        self.tokens = source.tokens

    def frames(self, part: KVSlice) -> Iterator[Frame]:
        """Yield all of `part` in pieces of about 1 MiB.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        check_part(part, self._plan.target.layers, self.tokens)
        target_layer = part.layer * self._to.layer_rows * self._row_bytes
        for piece in self._pieces_of(part.start, part.end):
            data = self._gather(piece, part.layer)
            yield Frame(part.layer, piece.offsets + target_layer, piece.lengths, data)

    def _gather(self, piece: _Piece, layer: int) -> NDArray[np.uint8]:
        rows = self._scratch[: len(piece.source)]
        index = piece.source + layer * self._from.layer_rows
        # mode="clip" because numpy buffers `out` otherwise; the rows are in range already.
        np.take(self._rows, index, axis=0, out=rows, mode="clip")
        words: Words = rows
        if self._plan.pairing and piece.keys is not None:
            heads = rows.reshape(len(rows), -1, self._plan.target.head_dim)
            heads[piece.keys] = pair(heads[piece.keys], self._plan.pairing)
        if self._plan.cast:
            words = cast(rows, *self._plan.cast)
        return words.reshape(-1).view(np.uint8)

    def _pieces_of(self, start: int, end: int) -> Iterator[_Piece]:
        """Pieces of tokens `start` to `end`; kept, as the next layer usually asks the same."""
        if self._cached == (start, end):
            yield from self._pieces
            return
        keep = (end - start) * self._to.rows_per_token <= CACHED_ROWS
        made: list[_Piece] = []
        for first, last in self._cuts(start, end):
            for piece in self._make(first, last):
                if keep:
                    made.append(piece)
                yield piece
        if keep:
            self._cached, self._pieces = (start, end), made

    def _cuts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut at the target's block borders, so that runs stay long."""
        block = self._plan.target.block_tokens
        step = max(1, self._frame_rows // self._to.rows_per_token // block) * block
        while start < end:
            border = min(end, (start // step + 1) * step)
            yield start, border
            start = border

    def _make(self, start: int, end: int) -> Iterator[_Piece]:
        """Pieces of at most a frame, sorted by target address, neighbours merged into runs."""
        there = self._to.rows(start, end)
        here = self._from.rows(start, end)
        kv = np.broadcast_to(np.arange(there.shape[0])[:, None, None], there.shape)
        # Mostly sorted already, which is what the stable sort is quick at.
        order = np.argsort(there, axis=None, kind="stable")
        there, here, kv = there.reshape(-1)[order], here.reshape(-1)[order], kv.reshape(-1)[order]
        for first in range(0, len(order), self._frame_rows):
            cut = slice(first, first + self._frame_rows)
            rows = there[cut]
            # The last block and, one row of blocks further, the first are no neighbours.
            breaks = (np.diff(rows, prepend=rows[0] - 2) != 1) | (rows % self._to.wrap_rows == 0)
            first_of_run = np.flatnonzero(breaks)
            counts = np.diff(first_of_run, append=len(rows))
            yield _Piece(
                here[cut],
                (kv[cut] == 0) if self._plan.pairing else None,
                rows[first_of_run] * self._row_bytes,
                counts * self._row_bytes,
            )


def _addresses_of(landing: Landing, tokens: int, inner: tuple[Axis, ...]) -> Addresses:
    """Where to write. A landing comes from another worker: what is wrong with it is not ours."""
    if landing.tokens != tokens:
        raise PeerMisbehaved(
            f"landing {landing.id}: tokens: {landing.tokens}, for a prefix of {tokens}"
        )
    try:
        return Addresses(landing.layout, landing.pool_blocks, landing.blocks, tokens, inner)
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
