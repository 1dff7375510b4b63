"""Heads spread over several pools reach several pools, each exactly once."""

import asyncio

import msgspec
import numpy as np
import pytest
from naive import Naive, convert

from transfer.contract import Source, whole
from transfer.errors import DigestMismatch, LayoutMismatch
from transfer.layout import Epoch, KVLayout, Landing, Shard
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender
from transfer.sharded import Gathering, ShardedWriter, share, split

MODEL = KVLayout(
    model="m", weights="w", layers=2, kv_heads=8, head_dim=4, dtype="float32", block_tokens=4,
    rope="half", axes="layer kv block token head dim",
)  # fmt: skip
DECODE = msgspec.structs.replace(
    MODEL, block_tokens=3, axes="block layer kv head token dim", dtype="bfloat16"
)
TOKENS = 10


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
        self.sources, self.receivers, self.gatherings, self.wanted, self.pools = [], [], [], [], []
        for shard in sources:
            layout = msgspec.structs.replace(MODEL, shard=shard)
            pool = random.standard_normal(6 * layout.block_bytes // 4, dtype=np.float32)
            self.sources.append(Source(layout, pool.view(np.uint8), 6, (4, 0, 3), TOKENS))
        self.parts = []
        for number, shard in enumerate(targets):
            layout = msgspec.structs.replace(DECODE, shard=shard)
            pool = random.integers(0, 256, 6 * layout.block_bytes, np.uint8)
            receiver = MemoryReceiver(self.network, layout, name=f"decode-{number}")
            landing = Landing(
                id=f"landing-{number}", epoch=Epoch(1, 1), secret=b"", worker="d",
                endpoints=(receiver.endpoint,), layout=layout, pool_blocks=6,
                blocks=(5, 1, 2, 0), tokens=TOKENS, lease_seconds=9.0,
            )  # fmt: skip
            self.receivers.append(receiver)
            shares = share(sources, shard, number)
            parts = split(landing, shares)
            self.parts.append(parts)
            wanted = pool.copy()
            for source, heads in zip(self.sources, shares, strict=True):
                if heads is not None:
                    convert(
                        Naive(source.layout, 6, source.blocks, source.pool),
                        Naive(layout, 6, landing.blocks, wanted),
                        TOKENS, range(heads.first, heads.end),
                    )  # fmt: skip
            self.wanted.append(wanted)
            self.pools.append(pool)
            gathering = Gathering(
                receiver, landing, [it for it in parts if it is not None],
                arrived=self.arrived, failed=self.told.append,
            )  # fmt: skip
            gathering.expect(pool, lambda: None)
            self.gatherings.append(gathering)

    def arrived(self, arrival):
        self.told.append((arrival.landing, arrival.note, arrival.bytes))
        return b"taken"

    async def push(self, number, commit=True):
        writer = ShardedWriter()
        try:
            async with MemorySender(self.network) as sender:
                for parts in self.parts:
                    if parts[number] is not None:
                        await writer.open(sender, parts[number], self.sources[number])
                for part in whole(MODEL.layers, TOKENS):
                    await writer.write(part)
                return await writer.commit(b"note", 5.0) if commit else None
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
async def test_each_target_shard_gets_its_heads_and_its_owner_is_told_once(sources, targets):
    site = Site(sources, targets)
    await asyncio.gather(*(site.push(it) for it in range(len(sources))))
    for pool, wanted in zip(site.pools, site.wanted, strict=True):
        assert (pool == wanted).all()
    sizes = [TOKENS * it.layout.token_bytes for it in site.receivers]
    assert sorted(site.told) == [(f"landing-{it}", b"note", size) for it, size in enumerate(sizes)]


async def test_nothing_is_admitted_while_one_source_shard_is_missing():
    site = Site(even(4), even(2))
    await asyncio.gather(*(site.push(it) for it in (0, 2, 3)))
    assert [it[0] for it in site.told] == ["landing-1"]
    await site.push(1)
    assert [it[0] for it in site.told] == ["landing-1", "landing-0"]


async def test_one_damaged_shard_fails_its_target_once():
    site = Site(even(4), even(2))
    await site.push(0)
    writer = ShardedWriter()
    async with MemorySender(site.network) as sender:
        await writer.open(sender, site.parts[0][1], site.sources[1])
        for part in whole(MODEL.layers, TOKENS):
            await writer.write(part)
        site.pools[0][:] ^= 1
        with pytest.raises(DigestMismatch):
            await writer.commit(b"note", 5.0)
        await writer.abort()
    assert [type(it) for it in site.told] == [DigestMismatch]
    site.gatherings[0].withdraw()
    await site.gatherings[0].quiesce()
