"""Prove that a prefix lies in the target pool as it lies in the source pool.

The digest is a sum, modulo 2**64 in each of two lanes, of hashes of tiles. A tile is the vector
of one head for one token, keyed by its canonical place (layer, K or V, token, head) and by the
landing, so that each end goes through its own memory in its own order, and neither what is left
of an earlier handoff nor anything in a wrong place agrees. Both ends use `PrefixDigest`: the
sender reads its source (not what it converted to send), the receiver its own pool.

The tile hash is multilinear: the words of a tile times secret random factors, modulo 2**64, once
whole and once only their upper halves (which the first sum does not see well). Two unlike tiles
agree with a probability of about 2**-33 in each tile, for anyone who does not know the landing's
secret. What remains of a tile is then mixed with its place before it is added up.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.contract import Buffer, KVSlice
from transfer.convert import CACHED_ROWS, check_part
from transfer.layout import Landing
from transfer.plan import Plan
from transfer.rounding import cast, pair
from transfer.rows import WORD, Addresses, Rows, Words, table

U64 = NDArray[np.uint64]

PIECE_BYTES = 1 << 19
DIGEST_BYTES = 16
TOKEN_BITS = 32
ODD = np.uint64(0x9E3779B97F4A7C15)


class PrefixDigest:
    """Sums up the tiles of one prefix as they lie in one pool. Each slice is added once."""

    def __init__(
        self,
        plan: Plan,
        pool: Buffer,
        pool_blocks: int,
        blocks: tuple[int, ...],
        tokens: int,
        key: bytes,
    ) -> None:
        """Look at a prefix in a pool of `plan.source`; its digest is that of `plan.target`.

        Raises:
            ValueError: pool, blocks and tokens contradict each other.
        """
        self._plan = plan
        self._tokens = tokens
        self._rows = table(pool, plan.source, pool_blocks, ("dim",))
        self._where = Addresses(plan.source, pool_blocks, blocks, tokens, ("dim",))
        words = -(-plan.target.head_dim * plan.target.item_bytes // 8)
        self._key = _Key(key, words)
        self._piece_rows = max(1, PIECE_BYTES // (words * 8))
        # 64-bit words for alignment; the numbers of the source are gathered into a view of it.
        wide = -(-plan.source.head_dim * plan.source.item_bytes // 8)
        self._scratch = np.empty(self._piece_rows * wide, dtype=np.uint64)
        self._cached = (0, 0)
        self._pieces: list[_Piece] = []
        self._lanes = [0, 0]

    def add(self, part: KVSlice) -> None:
        """Add one slice.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        check_part(part, self._plan.target.layers, self._tokens)
        self._add(part.layer, part.layer + 1, part.start, part.end)

    def add_all(self) -> None:
        """Add the whole prefix; of a short one, several layers at a time."""
        layers = self._plan.target.layers
        step = max(1, self._piece_rows // (self._tokens * self._where.rows_per_token))
        for first in range(0, layers, step):
            self._add(first, min(layers, first + step), 0, self._tokens)

    def _add(self, first: int, last: int, start: int, end: int) -> None:
        """Add tokens `start` to `end` of layers `first` to `last`, all ends exclusive."""
        layers = np.arange(first, last, dtype=np.int64)[:, None]
        layer_places = layers.astype(np.uint64) * np.uint64(
            (2 * self._plan.target.kv_heads) << TOKEN_BITS
        )
        for piece in self._pieces_of(start, end):
            rows = (layers * self._where.layer_rows + piece.rows).reshape(-1)
            keys = None if piece.keys is None else np.tile(piece.keys, last - first)
            tiles = self._gather(rows, keys)
            sums = self._key.sums(tiles, (layer_places + piece.places).reshape(-1))
            for lane, total in enumerate(sums):
                self._lanes[lane] = (self._lanes[lane] + total) % (1 << 64)

    def result(self) -> bytes:
        """The sum so far."""
        return struct.pack(">QQ", *self._lanes)

    def _gather(self, rows: Rows, keys: NDArray[np.bool_] | None) -> U64:
        """The tiles at `rows` as the target has them, in 64-bit words; scratch memory."""
        plan = self._plan
        words: Words = self._scratch.view(WORD[plan.source.item_bytes])
        words = words[: len(rows) * plan.source.head_dim].reshape(len(rows), -1)
        np.take(self._rows, rows, axis=0, out=words, mode="clip")
        if plan.pairing and keys is not None:
            words[keys] = pair(words[keys], plan.pairing)
        if plan.cast:
            words = cast(words, *plan.cast)
        tile_bytes = plan.target.head_dim * plan.target.item_bytes
        if tile_bytes % 8:
            padded = np.zeros((len(rows), -(-tile_bytes // 8) * 8), dtype=np.uint8)
            padded[:, :tile_bytes] = words.view(np.uint8)
            return padded.view(np.uint64)
        return words.view(np.uint64)

    def _pieces_of(self, start: int, end: int) -> Iterator[_Piece]:
        """Rows and places of layer 0, in pieces; kept, as the next layer usually asks the same."""
        if self._cached == (start, end):
            yield from self._pieces
            return
        tokens = max(1, self._piece_rows // self._where.rows_per_token)
        keep = (end - start) * self._where.rows_per_token <= CACHED_ROWS
        made: list[_Piece] = []
        for first in range(start, end, tokens):
            for piece in self._make(first, min(end, first + tokens)):
                if keep:
                    made.append(piece)
                yield piece
        if keep:
            self._cached, self._pieces = (start, end), made

    def _make(self, start: int, end: int) -> Iterator[_Piece]:
        rows = self._where.rows(start, end)
        kv, token, head = np.ix_(
            np.arange(2, dtype=np.uint64),
            np.arange(start, end, dtype=np.uint64),
            np.arange(rows.shape[2], dtype=np.uint64),
        )
        heads = np.uint64(rows.shape[2])
        places = (((kv * heads + head) << np.uint64(TOKEN_BITS)) + token).reshape(-1)
        keys = (places >> np.uint64(TOKEN_BITS)) < heads
        rows = rows.reshape(-1)
        for first in range(0, len(rows), self._piece_rows):
            cut = slice(first, first + self._piece_rows)
            yield _Piece(rows[cut], places[cut], keys[cut] if self._plan.pairing else None)


class _Piece(msgspec.Struct, frozen=True, eq=False):
    """Tiles of a slice, the same for every layer but for a constant."""

    rows: Rows
    places: U64
    keys: NDArray[np.bool_] | None


class _Key:
    """The random factors of one landing."""

    def __init__(self, key: bytes, words: int) -> None:
        stream = hashlib.shake_256(b"baton digest 1" + key).digest(8 * (2 * words + 1))
        numbers: U64 = np.frombuffer(stream, dtype="<u8").astype(np.uint64)
        self._whole = numbers[:words] | np.uint64(1)
        self._upper = numbers[words : 2 * words] | np.uint64(1)
        self._seed = numbers[-1]

    def sums(self, tiles: U64, places: U64) -> tuple[int, int]:
        """Hash each tile with its place and add up, in two lanes. Destroys `tiles`."""
        whole: U64 = np.einsum("ij,j->i", tiles, self._whole)
        tiles >>= np.uint64(32)
        upper: U64 = np.einsum("ij,j->i", tiles, self._upper)
        places *= ODD
        places += self._seed
        first = _mix(places + whole)
        second = _mix(first + upper)
        return int(np.add.reduce(first)), int(np.add.reduce(second))


def landing_key(landing: Landing) -> bytes:
    """What makes this landing's digest unlike that of every other."""
    epoch = struct.pack(">QQ", landing.epoch.incarnation, landing.epoch.counter)
    return epoch + struct.pack(">I", len(landing.secret)) + landing.secret + landing.id.encode()


def _mix(values: U64) -> U64:
    """Spread every bit over all others, one to one (the finaliser of SplitMix64)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
