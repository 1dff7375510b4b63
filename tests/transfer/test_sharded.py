"""Heads spread over several pools reach several pools, each exactly once."""

import asyncio

import msgspec
import numpy as np
import pytest
from naive import Naive, convert

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import Receipt, Source, whole
from transfer.errors import DigestMismatch, LandingGone, LayoutMismatch
from transfer.layout import Epoch, KVLayout, Landing, Shard
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender
from transfer.sharded import Gathering, ShardedWriter, parts_of, pieces, share

MODEL = KVLayout(
    model="m", weights="w", layers=2, kv_heads=8, head_dim=4, dtype="float32", block_tokens=4,
    rope="half", axes="layer kv block token head dim",
)  # fmt: skip
DECODE = msgspec.structs.replace(
    MODEL, block_tokens=3, axes="block layer kv head token dim", dtype="bfloat16"
)
TOKENS = 10
BLOCKS = (5, 1, 2, 0)


def even(count, heads=8):
    """So many shards, each with as many heads; replicas where there are more shards than heads."""
    if count > heads:
        return [Shard(it * heads // count, 1) for it in range(count)]
    return [Shard(it * heads // count, heads // count) for it in range(count)]


@pytest.mark.parametrize(
    ("sources", "target", "turn", "shares"),
    [
        (even(4), Shard(0, 4), 0, [Shard(0, 2), Shard(2, 2), None, None]),
        (even(2), Shard(2, 2), 0, [Shard(2, 2), None]),
        ([Shard(0, 1)], Shard(0, 1), 2, [Shard(0, 1)]),
        ([Shard(0, 4)] * 2, Shard(0, 4), 0, [Shard(0, 2), Shard(2, 2)]),
        ([Shard(0, 3)] * 2, Shard(0, 3), 1, [Shard(2, 1), Shard(0, 2)]),
        ([Shard(0, 1)] * 3, Shard(0, 1), 1, [None, Shard(0, 1), None]),
        ([Shard(0, 3), Shard(3, 5)], Shard(1, 4), 0, [Shard(1, 2), Shard(3, 2)]),
        ([Shard(0, 6), Shard(4, 4)], Shard(0, 8), 0, [Shard(0, 6), Shard(6, 2)]),
        ([Shard(0, 6), Shard(4, 4)], Shard(4, 4), 0, [None, Shard(4, 4)]),
    ],
)
def test_every_head_is_sent_once_and_replicas_share(sources, target, turn, shares):
    assert share(sources, target, turn) == shares


def test_a_head_that_is_nowhere_is_named():
    with pytest.raises(LayoutMismatch, match="no source has head 4"):
        share([Shard(0, 4)], Shard(0, 8))


class Site:
    """Source pools and target pools of one prefix, with everything between them."""

    def __init__(self, sources, targets):
        self.network = MemoryNetwork()
        self.told = []
        random = np.random.default_rng(0)
        self.sources, self.receivers, self.wanted, self.pools = [], [], [], []
        for shard in sources:
            layout = msgspec.structs.replace(MODEL, shard=shard)
            pool = random.standard_normal(6 * layout.block_bytes // 4, dtype=np.float32)
            self.sources.append(Source(layout, pool.view(np.uint8), 6, (4, 0, 3), TOKENS))
        layouts = [msgspec.structs.replace(DECODE, shard=shard) for shard in targets]
        parts = parts_of(sources, layouts)
        for number, layout in enumerate(layouts):
            pool = random.integers(0, 256, 6 * layout.block_bytes, np.uint8)
            receiver = MemoryReceiver(self.network, layout, name=f"decode-{number}")
            self.receivers.append(receiver)
            wanted = pool.copy()
            shares = share(sources, layout.heads, number)
            for source, heads in zip(self.sources, shares, strict=True):
                if heads is not None:
                    convert(
                        Naive(source.layout, 6, source.blocks, source.pool),
                        Naive(layout, 6, BLOCKS, wanted),
                        TOKENS, range(heads.first, heads.end),
                    )  # fmt: skip
            self.wanted.append(wanted)
            self.pools.append(pool)
        endpoints = tuple(
            msgspec.structs.replace(it.endpoint, shard=number)
            for number, it in enumerate(self.receivers)
        )
        landing = Landing(
            id="landing", epoch=Epoch(1, 1), secret=b"", worker="d", endpoints=endpoints,
            layout=DECODE, pool_blocks=6, blocks=BLOCKS, tokens=TOKENS, lease_seconds=9.0,
            parts=parts,
        )  # fmt: skip
        self.pieces = pieces(landing)
        self.gathering = Gathering(landing)
        for piece in self.pieces:
            self.receivers[piece.target].expect(
                piece.landing, self.pools[piece.target],
                touched=lambda: None, arrived=self.arrived, failed=self.told.append,
            )  # fmt: skip

    def arrived(self, arrival):
        whole = self.gathering.add(arrival)
        if whole is not None:
            self.told.append((whole.landing, whole.note, whole.bytes))
        return b"taken" if whole is not None else b""

    async def push(self, number, note=b"note"):
        """All that one of the source's pools has to send."""
        writer = ShardedWriter()
        try:
            async with MemorySender(self.network) as sender:
                for piece in self.pieces:
                    if piece.source == number:
                        await writer.open(sender, piece.landing, self.sources[number])
                for part in whole(MODEL.layers, TOKENS):
                    await writer.write(part)
                return await writer.commit(note, PATIENCE_SECONDS)
        finally:
            await writer.abort()


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        (even(4), even(2)),
        (even(2), even(4)),
        ([Shard(0, 8)], [Shard(0, 8)] * 3),
        ([Shard(0, 8)] * 2, even(2)),
        ([Shard(0, 3), Shard(3, 5)], [Shard(0, 5), Shard(5, 3)]),
        (even(16), even(8)),
    ],
    ids=["4 to 2", "2 to 4", "1 to 3 replicas", "2 replicas to 2", "uneven", "16 replicas to 8"],
)
async def test_every_pool_gets_its_heads_and_the_owner_is_told_once(sources, targets):
    site = Site(sources, targets)
    await asyncio.gather(*(site.push(it) for it in range(len(sources))))
    for pool, wanted in zip(site.pools, site.wanted, strict=True):
        assert (pool == wanted).all()
    size = sum(TOKENS * it.layout.token_bytes for it in site.receivers)
    assert site.told == [("landing", b"note", size)]


def test_one_pool_on_either_side_is_no_part():
    assert parts_of([Shard(0, 8)], [DECODE]) == ()
    landing = Landing(
        id="l", epoch=Epoch(1, 1), secret=b"", worker="d", endpoints=(), layout=DECODE,
        pool_blocks=6, blocks=BLOCKS, tokens=TOKENS, lease_seconds=9.0,
    )  # fmt: skip
    assert [it.landing for it in pieces(landing)] == [landing]


async def test_nothing_is_admitted_while_one_source_shard_is_missing():
    site = Site(even(4), even(2))
    await asyncio.gather(*(site.push(it) for it in (0, 2, 3)))
    assert site.told == []
    await site.push(1)
    assert [it[0] for it in site.told] == ["landing"]


async def test_parts_that_do_not_agree_on_their_note_are_not_admitted():
    site = Site(even(2), [Shard(0, 8)])
    await site.push(0)
    with pytest.raises(LandingGone, match="unlike notes"):
        await site.push(1, b"another")
    assert site.told == []


class Ending:
    """A writer whose commit ends as it was told, after so many turns."""

    def __init__(self, turns, end):
        self._turns, self._end = turns, end

    async def open(self, landing, source):
        return self

    async def commit(self, note, seconds):
        for _ in range(self._turns):
            await asyncio.sleep(0)
        if isinstance(self._end, Exception):
            raise self._end
        return self._end


async def test_a_commit_fails_with_the_reason_though_the_withdrawal_of_the_others_is_heard_first():
    writer = ShardedWriter()
    landed = Receipt(0.1, b"", 5)
    for turns, end in ((1, LandingGone("withdrawn")), (5, DigestMismatch("wrong")), (1, landed)):
        await writer.open(Ending(turns, end), None, None)
    with pytest.raises(DigestMismatch):
        await writer.commit(b"", 1.0)


async def test_one_damaged_shard_fails_the_whole():
    site = Site(even(4), even(2))
    await asyncio.gather(*(site.push(it) for it in (0, 2, 3)))
    writer = ShardedWriter()
    async with MemorySender(site.network) as sender:
        (piece,) = [it for it in site.pieces if it.source == 1]
        await writer.open(sender, piece.landing, site.sources[1])
        for part in whole(MODEL.layers, TOKENS):
            await writer.write(part)
        site.pools[0][:] ^= 1
        with pytest.raises(DigestMismatch):
            await writer.commit(b"note", PATIENCE_SECONDS)
        await writer.abort()
    assert [type(it) for it in site.told] == [DigestMismatch]
