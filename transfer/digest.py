"""Prove that a prefix lies in the target pool as it lies in the source pool.

The digest is a sum, modulo 2**64 in each of two lanes, of hashes of tiles. A tile is the vector
of one head for one token, keyed by its canonical place (layer, K or V, token, head) and by the
landing, so that each end goes through its own memory in its own order, and neither what is left
of an earlier handoff nor anything in a wrong place agrees. Both ends use `PrefixDigest`: the
sender reads its source (not what it converted to send), the receiver its own pool.

A scale is a tile of its own. A tile is hashed by NH on 64-bit words, which is 2**-64-almost
universal on strings of equal length (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO 1999,
theorem 4.2): two unlike tiles agree in all 128 bits with a probability of at most 2**-64, for
anyone who does not know the landing's secret. Both halves and the place then go through one-to-one
mixing before they are added up: a single tile that hashes differently always shows.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import msgspec
import numpy as np

from transfer.contract import Buffer, KVSlice, Proof
from transfer.convert import kept
from transfer.kernels import (
    TOKEN_BITS,
    U64,
    WORD_BYTES,
    Form,
    Table,
    Tiles,
    add_tiles,
    scratch_bytes,
)
from transfer.layout import ITEM_BYTES, DType, KVLayout, Landing
from transfer.plan import Plan, plan
from transfer.pool import Pool
from transfer.raw import PAIR_BYTES
from transfer.rows import Kind, Side, Walks, sides
from transfer.scaling import Scaling, canonical, scale_counts, scale_form, table_of

DIGEST_BYTES = 16
SEAL_BYTES = 16
SCALES = 1 << 62
"""Where the places of scales begin."""


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
        apart: int = 1 << TOKEN_BITS,
    ) -> None:
        """Look at a prefix in a pool of `plan.source`; its digest is that of `plan.target`.

        Every `apart` tokens, which must not cut a block of the source, are summed up apart.

        Raises:
            ValueError: pool, blocks and tokens contradict each other.
        """
        self.layers = plan.target.layers
        self._plan = plan
        self._tokens = tokens
        self._pool = Pool.of(plan.source, pool_blocks, pool)
        self._where = sides(plan.source, pool_blocks, blocks, tokens, plan.heads.first)
        self._scaling: Scaling | None = None
        if plan.recode and plan.target.scales is not None:
            self._scaling = Scaling(plan, self._pool, self._where, tokens)
        self._parts = [self._numbers(), *self._scales()]
        self._keys = _keys(key, plan.target.head_dim * plan.target.item_bytes)
        self._scratch = np.empty(scratch_bytes(plan.source.head_dim), np.uint8)
        self._apart = apart
        self._sums: U64 = np.zeros((-(-tokens // apart), 2), np.uint64)

    def add(self, part: KVSlice) -> None:
        """Add one slice.

        Raises:
            ValueError: `part` is not a part of the prefix.
        """
        for some in kept(self._plan, part, self._tokens):
            self._add(some.layer, some.layer + some.layers, some.start, some.end)

    def add_all(self, start: int = 0, end: int | None = None) -> None:
        """Add the whole prefix, or tokens `start` to `end` (exclusive) of all layers."""
        end = self._tokens if end is None else end
        if start < end:
            self.add(KVSlice(0, start, end, self._plan.target.layers))

    def prepare(self, start: int, end: int) -> None:
        """Find the way through tokens `start` to `end` (exclusive), as adding them would."""
        for part in self._parts:
            part.walks.over(start, end)

    def result(self) -> bytes:
        """The sum so far."""
        return add_up([self.parts()])

    def parts(self) -> bytes:
        """The sums so far of each `apart` tokens, one after the other."""
        return self._sums.astype(">u8").tobytes()

    def _add(self, first: int, last: int, start: int, end: int) -> None:
        """Add tokens `start` to `end` of layers `first` to `last`, all ends exclusive."""
        if self._scaling is not None:
            self._scaling.fill(first, start, end)
        for part in self._parts:
            add_tiles(*self._told(part, first, last, start, end))

    def tiles(self, part: KVSlice) -> Tiles | None:
        """What `add_tiles` is told to add `part`; None where one call does not do that."""
        [some, *others] = kept(self._plan, part, self._tokens)
        if others or len(self._parts) > 1:
            return None
        last = some.layer + some.layers
        return self._told(self._parts[0], some.layer, last, some.start, some.end)

    def _told(self, part: _Part, first: int, last: int, start: int, end: int) -> Tiles:
        way = part.walks.over(start, end)
        return (
            way.strips,
            way.steps,
            first,
            last,
            part.table,
            part.layer_places,
            table_of(self._pool, self._where, 1),
            self._scaling.address if self._scaling is not None else 0,
            part.form,
            self._keys,
            self._keys.ctypes.data,
            self._scratch.ctypes.data,
            self._apart,
            self._sums,
        )

    def _numbers(self) -> _Part:
        plan = self._plan
        places = _places(plan, self._tokens)
        from_scales = self._where[1] if len(self._where) > 1 else None
        to_scales = self._scaling.side if self._scaling is not None else None
        tile_bytes = plan.source.head_dim * plan.source.item_bytes
        kind = Kind(plan.counts, ("dim",), (1, tile_bytes), (from_scales, to_scales))
        walks = Walks(places, self._where[0], kind)  # in the order of memory
        table = table_of(self._pool, self._where, 0)
        return _Part(walks, table, places.along("layer"), plan.form)

    def _scales(self) -> Iterator[_Part]:
        """The tiles that are the target's scales, one each."""
        plan, theirs = self._plan, self._plan.target.scales
        if theirs is None:
            return
        form: DType
        counts = scale_counts(plan, plan.target)
        places = _places(plan, self._tokens, SCALES)
        if self._scaling is not None:
            memory, table, form = self._scaling.side, self._scaling.table, "float32"
        else:
            memory, form = self._where[1], theirs.dtype
            table = table_of(self._pool, self._where, 1)
        walks = Walks(places, memory, Kind(counts, (), (1, ITEM_BYTES[form])))
        yield _Part(walks, table, places.along("layer"), scale_form(form, theirs.dtype))


def prove(
    layout: KVLayout,
    pool: Buffer,
    pool_blocks: int,
    blocks: tuple[int, ...],
    start: int,
    key: bytes,
) -> list[Proof]:
    """Look at full blocks of a prefix, from number `start` of `blocks` on. Slow; any thread."""
    tokens = len(blocks) * layout.block_tokens
    size = layout.block_tokens
    digest = PrefixDigest(plan(layout, layout), pool, pool_blocks, blocks, tokens, key, size)
    digest.add_all(start * size)
    return [Proof(key, it) for it in apart(digest.parts())[start:]]


def changed(
    layout: KVLayout,
    pool: Buffer,
    pool_blocks: int,
    blocks: tuple[int, ...],
    proofs: Sequence[Proof],
) -> int | None:
    """Which is the first of `blocks`, the beginning of a prefix, that is not what was proven."""
    found: list[Proof] = []
    for key, some in groupby(proofs, key=lambda it: it.key):
        end = len(found) + len(list(some))
        found += prove(layout, pool, pool_blocks, blocks[:end], len(found), key)
    return next((it for it, proof in enumerate(proofs) if found[it] != proof), None)


def apart(digests: bytes) -> list[bytes]:
    """One digest after the other."""
    return [digests[it : it + DIGEST_BYTES] for it in range(0, len(digests), DIGEST_BYTES)]


def add_up(digests: Iterable[bytes]) -> bytes:
    """The digest of a whole, from those of its parts, or of several each."""
    lanes = np.zeros((1, 2), np.uint64)
    for digest in digests:
        some = np.frombuffer(digest, ">u8").astype(np.uint64).reshape(-1, 2)
        lanes += some.sum(axis=0, dtype=np.uint64)
    return lanes.astype(">u8").tobytes()


class _Part(msgspec.Struct, frozen=True, eq=False):
    """One of the arrays of a pool: walks from places to it, and how its tiles are converted."""

    walks: Walks
    table: Table
    layer_places: int
    form: Form


def _places(plan: Plan, tokens: int, origin: int = 0) -> Side:
    """The canonical places as if they were memory: (layer, K or V, head, token), one for each."""
    heads = 1 << TOKEN_BITS
    planes = plan.target.kv_heads * heads
    step = {"layer": 2 * planes, "kv": planes, "head": heads, "token": 1}
    origin += plan.heads.first * heads
    return msgspec.structs.replace(canonical(tokens, step), origin=origin)


def _keys(key: bytes, tile_bytes: int) -> U64:
    """The random factors of one landing; the last is the seed."""
    words = -(-tile_bytes // PAIR_BYTES) * PAIR_BYTES // WORD_BYTES
    stream = hashlib.shake_256(b"baton digest 3" + key).digest(WORD_BYTES * (words + 1))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def seal(landing: Landing, digest: bytes, note: bytes) -> bytes:
    """What shows whoever knows the landing's secret that a digest and a note belong together."""
    secret = landing_key(landing)
    key = hashlib.blake2b(secret, digest_size=32, person=b"baton seal key").digest()
    hashed = hashlib.blake2b(key=key, digest_size=SEAL_BYTES, person=b"baton seal")
    hashed.update(struct.pack(">I", len(digest)) + digest)
    hashed.update(note)
    return hashed.digest()


def landing_key(landing: Landing) -> bytes:
    """What makes this landing's digest unlike that of every other."""
    epoch = struct.pack(">QQ", landing.epoch.incarnation, landing.epoch.counter)
    return epoch + struct.pack(">I", len(landing.secret)) + landing.secret + landing.id.encode()
