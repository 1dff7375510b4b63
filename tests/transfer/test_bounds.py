"""Which runs a landing may be written with, against a mask of every single byte."""

import msgspec
import numpy as np
import pytest
from tcp_desk import WIDE, Owner, Stranger, opening, runs

from transfer.bounds import Bounds
from transfer.errors import PeerMisbehaved
from transfer.layout import Epoch, KVLayout, Landing, Scales, Shard
from transfer.stage import eventually
from transfer.tcp import TcpReceiver

POOL_BLOCKS = 5
PLAIN = KVLayout(
    model="m", weights="w", layers=2, kv_heads=6, head_dim=2, dtype="float16", block_tokens=2,
    rope="half", shard=Shard(1, 4),
)  # fmt: skip
SCALED = msgspec.structs.replace(PLAIN, dtype="int8", scales=Scales("layer block head token kv"))
LAYOUTS = [
    *(
        msgspec.structs.replace(PLAIN, axes=axes)
        for axes in (
            "block layer kv head token dim",
            "head layer kv block token dim",
            "layer kv block token head dim",
            "layer kv | block token head dim",
            "head | block layer kv token dim",
        )
    ),
    SCALED,
]


def landing_for(layout, heads, blocks=(3, 1, 2)):
    return Landing(
        id="l", epoch=Epoch(1, 1), secret=b"", worker="w", endpoints=(), layout=layout,
        pool_blocks=POOL_BLOCKS, blocks=blocks, tokens=5, lease_seconds=1.0, heads=heads,
    )  # fmt: skip


def mask_of(landing):
    """Of every byte of the pool: the number of its region, or -1 if it is not the landing's."""
    masks, first = [], 0
    heads = landing.heads or landing.layout.heads
    ours = [it - landing.layout.heads.first for it in range(heads.first, heads.end)]
    for array in landing.layout.tables(POOL_BLOCKS):
        axes, sizes = list(array.order.axes), tuple(array.sizes.values())
        mine = np.ones(sizes, np.bool_)
        for axis, chosen in (("block", landing.blocks), ("head", ours)):
            along = np.isin(np.arange(array.sizes[axis]), chosen)
            mine &= along.reshape([-1 if it == axis else 1 for it in axes])
        region = first + np.arange(array.regions).repeat(mine.size // array.regions)
        masks.append(np.where(mine.ravel(), region, -1).repeat(array.item_bytes))
        first += array.regions
    return np.concatenate(masks)


@pytest.mark.parametrize("heads", [None, Shard(1, 4), Shard(1, 1), Shard(2, 2), Shard(4, 1)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda it: f"{it.axes} {it.dtype}")
def test_a_run_is_inside_exactly_where_every_byte_of_it_is(layout, heads):
    landing = landing_for(layout, heads)
    bounds, mask = Bounds(landing), mask_of(landing)
    for length in (1, 2, 3, 8, 16, 17, 64):
        for offset in range(-2, mask.size + 2):
            part = mask[max(offset, 0) : offset + length]
            inside = len(part) == length and part[0] >= 0 and bool((part == part[0]).all())
            found = bounds.first_outside(np.array([offset]), np.array([length]))
            assert (found is None) == inside, (offset, length)


def test_a_scale_that_heads_of_others_share_is_nobody_s():
    layout = msgspec.structs.replace(SCALED, scales=Scales("layer block token"))
    scale = layout.tables(POOL_BLOCKS)[0].nbytes
    at = np.array([scale + 4 * layout.block_tokens])  # of block 1
    assert Bounds(landing_for(layout, None)).first_outside(at, np.array([4])) is None
    assert Bounds(landing_for(layout, Shard(1, 1))).first_outside(at, np.array([4])) == 0


@pytest.mark.parametrize("heads", [Shard(0, 1), Shard(4, 2), Shard(5, 1), Shard(9, 9)])
def test_heads_that_do_not_live_in_the_pool_are_refused(heads):
    with pytest.raises(ValueError, match=r"^heads"):
        Bounds(landing_for(PLAIN, heads))


HEAD_BYTES = WIDE.block_tokens * WIDE.head_dim * WIDE.item_bytes


@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (2, 2), (3, 1)], ids=["before", "across", "behind"]
)
async def test_a_tcp_sender_that_writes_heads_of_another_landing_is_cut_off(first, count):
    """They may have arrived, through a landing of their own."""
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver, heads=Shard(1, 2))
        stranger.say(opening(owner.landing))
        stranger.write(0, *runs((HEAD_BYTES, 2 * HEAD_BYTES)))
        stranger.lane.write(b"\xaa" * 2 * HEAD_BYTES)
        await eventually(lambda: owner.pool[3 * HEAD_BYTES - 1], "not even its own were written")
        stranger.write(0, *runs((first * HEAD_BYTES, count * HEAD_BYTES)))
        stranger.lane.write(b"\xbb" * count * HEAD_BYTES)
        assert await stranger.closed()
        assert [type(it) for it in owner.failures] == [PeerMisbehaved]
        assert owner.pool.sum(dtype=np.int64) == 2 * HEAD_BYTES * 0xAA
