"""Prove that a prefix lies in the target pool as it lies in the source pool.

The digest is a sum, modulo 2**64 in each of two lanes, of hashes of tiles. A tile is the vector
of one head for one token, keyed by its canonical place (layer, K or V, token, head) and by the
landing, so that each end goes through its own memory in its own order, and neither what is left
of an earlier handoff nor anything in a wrong place agrees. Both ends use `PrefixDigest`: the
sender reads its source (not what it converted to send), the receiver its own pool.

A tile is hashed by NH on 32-bit words, twice with independent keys. NH is 2**-32-almost universal
on strings of equal length (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO 1999, theorem
4.2), so two unlike tiles agree in both with a probability of at most 2**-64, for anyone who does
not know the landing's secret. Both hashes and the place then go through one-to-one mixing before
they are added up: a single tile that hashes differently always shows.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from transfer.contract import Buffer, KVSlice
from transfer.convert import check_part
from transfer.kernels import I64, U64, add_tiles
from transfer.layout import Landing
from transfer.plan import Plan
from transfer.pool import Pool
from transfer.rows import Side, Walks

DIGEST_BYTES = 16
TOKEN_BITS = 32
"""Places of neighbouring heads are so many bits apart."""


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
        self._pool = Pool.of(plan.source, pool_blocks, pool)
        self._where = Side.of(plan.source, pool_blocks, blocks, tokens)
        self._places = _places(plan, tokens)
        tile_bytes = plan.source.head_dim * plan.source.item_bytes
        # From places to memory, in the order of memory.
        self._walks = Walks(self._places, self._where, plan.counts, ("dim",), (1, tile_bytes))
        self._keys = _keys(key, -(-plan.target.head_dim * plan.target.item_bytes // 8))
        self._scratch = np.empty(3 * plan.scratch_bytes, np.uint8)
        self._sums: U64 = np.zeros(2, np.uint64)

    def add(self, part: KVSlice) -> None:
        """Add one slice.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        check_part(part, self._plan.target.layers, self._tokens)
        self._add(part.layer, part.layer + 1, part.start, part.end)

    def add_all(self) -> None:
        """Add the whole prefix."""
        self._add(0, self._plan.target.layers, 0, self._tokens)

    def result(self) -> bytes:
        """The sum so far."""
        return struct.pack(">QQ", *self._sums.tolist())

    def _add(self, first: int, last: int, start: int, end: int) -> None:
        """Add tokens `start` to `end` of layers `first` to `last`, all ends exclusive."""
        way = self._walks.over(start, end)
        add_tiles(
            way.strips,
            way.steps[1],
            way.steps[0],
            first,
            last,
            (self._pool.region_bytes, self._where.step["layer"]),
            self._places.step["layer"],
            self._pool.bases,
            self._plan.form,
            self._keys,
            self._scratch.ctypes.data,
            self._sums,
        )


def _places(plan: Plan, tokens: int) -> Side:
    """The canonical places as if they were memory: (layer, K or V, head, token), one for each."""
    heads = 1 << TOKEN_BITS
    planes = plan.target.kv_heads * heads
    step = {"layer": 2 * planes, "kv": planes, "head": heads, "block": 0, "token": 1}
    block: I64 = np.zeros(1, np.int64)
    return Side(("layer", "kv", "head", "block", "token", "dim"), (), step, block, tokens, 1)


def _keys(key: bytes, words: int) -> U64:
    """The random factors of one landing; the last is the seed."""
    stream = hashlib.shake_256(b"baton digest 2" + key).digest(8 * (4 * words + 1))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def landing_key(landing: Landing) -> bytes:
    """What makes this landing's digest unlike that of every other."""
    epoch = struct.pack(">QQ", landing.epoch.incarnation, landing.epoch.counter)
    return epoch + struct.pack(">I", len(landing.secret)) + landing.secret + landing.id.encode()
