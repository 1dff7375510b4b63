"""Handoffs between workers of which either has several pools, in one process, over real sockets."""

from typing import Any

import msgspec
import numpy as np
import pytest

from backends.api import allocate
from backends.emulation.synthetic import SyntheticBackend
from gateway.server import workers
from tests.life.cluster import SHAPE, Cluster, Heard, cluster
from transfer.layout import Shard

HEADS = 4
AXES = "head layer kv block token dim"
"""Heads outermost: a pool of some of them is a piece of the pool of all."""


class Sharded:
    """A backend whose pool is cut into several of as many heads each."""

    def __init__(self, count: int, block_tokens: int) -> None:
        shape = {**SHAPE, "kv_heads": HEADS, "block_tokens": block_tokens, "axes": AXES}
        self._inner = SyntheticBackend(**shape)
        each = HEADS // count
        shards = tuple(Shard(it * each, each) for it in range(count)) if count > 1 else ()
        self.info = msgspec.structs.replace(self._inner.info, shards=shards)
        self.pool: Any = np.split(self._inner.pool, count) if shards else self._inner.pool
        self.step, self.copy_blocks = self._inner.step, self._inner.copy_blocks
        self.ingest: Any = self._inner.ingest
        self.close = self._inner.close


class Replicated(Sharded):
    """A backend on devices that each have all heads; it computes on the first."""

    def __init__(self, count: int) -> None:
        super().__init__(1, 16)
        self.info = msgspec.structs.replace(self.info, shards=(Shard(0, HEADS),) * count)
        copies = [allocate(self._inner.pool.nbytes) for _ in range(count - 1)]
        self.pool = [self._inner.pool, *copies]
        self.ingested: list[bool] = []
        self.ingest = self._ingest

    def _ingest(self, blocks: Any) -> None:
        """Note whether every device was given the same."""
        by_block = [
            it.reshape(-1, self.info.pool_blocks, it.size // self._cells) for it in self.pool
        ]
        first, *others = (it[:, list(blocks)] for it in by_block)
        self.ingested.append(bool(first.any()) and all((it == first).all() for it in others))
        self._inner.ingest(blocks)

    @property
    def _cells(self) -> int:
        layout = self.info.layout
        return layout.kv_heads * layout.layers * 2 * self.info.pool_blocks


async def answered(made: Cluster, prompt: int = 40) -> list[int]:
    heard = Heard()
    await made.carry(made.job(list(range(prompt)), max_tokens=5), heard)
    return heard.tokens[0]


async def pair(made: Cluster, prefill: Any, decode: Any, name: str, **host: Any) -> None:
    await made.start("p", "prefill", backend=prefill, host={"transports": (name,), **host})
    await made.start("d", "decode", backend=decode, host={"transports": (name,)})
    await made.paired()


@pytest.mark.parametrize("name", ["shm", "tcp"])
@pytest.mark.parametrize(("ours", "theirs"), [(4, 2), (2, 4), (1, 4), (4, 1), (2, 2)])
async def test_every_head_reaches_the_pool_it_belongs_to(
    redis_url: str, name: str, ours: int, theirs: int
) -> None:
    """The decode worker looks at every number of the prefix; see `verify_kv`."""
    async with cluster(redis_url) as made:
        await pair(made, Sharded(ours, 32), Sharded(theirs, 16), name)
        tokens = await answered(made)
        assert len(tokens) == 5
        assert await answered(made) == tokens
        shown = workers(made.fleet)
        (both,) = shown["pairs"]
        assert both["plan"].startswith(f"{ours} to {theirs} pools; ")
        assert {it["worker"]: it["pools"] for it in shown["workers"]} == {"p": ours, "d": theirs}
        await made.balanced()


@pytest.mark.parametrize("name", ["shm", "tcp"])
async def test_every_replica_is_given_all_heads(redis_url: str, name: str) -> None:
    async with cluster(redis_url) as made:
        decode = Replicated(3)
        await pair(made, Sharded(1, 16), decode, name)
        assert len(await answered(made)) == 5
        assert decode.ingested == [True]
        await made.balanced()


@pytest.mark.parametrize("fault", ["flip_bit@3", "missing_page@2", "drop@2:1"])
async def test_a_part_that_fails_takes_the_others_with_it_and_all_is_done_again(
    redis_url: str, fault: str
) -> None:
    async with cluster(redis_url) as made:
        await pair(made, Sharded(4, 32), Sharded(2, 16), "tcp", faults=fault)
        tokens = await answered(made)
        assert tokens == await answered(made)
        await made.balanced()


async def test_pools_that_lack_heads_never_meet(redis_url: str) -> None:
    prefill = Sharded(2, 32)
    prefill.info = msgspec.structs.replace(prefill.info, shards=(Shard(0, 2), Shard(0, 2)))
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", backend=prefill)
        await made.start("d", "decode", backend=Sharded(2, 16))
        await made.until(lambda: made.fleet.pairs)
        ((_, _, met),) = made.fleet.pairs
        assert met.refusal == "shard: no source has head 2"


@pytest.mark.parametrize("name", ["shm", "tcp"])
async def test_several_pools_send_one_only_what_it_has_not(redis_url: str, name: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, Sharded(4, 32), Sharded(1, 16), name)
        reuse = made.hosts["d"]._requests.reuse.prefixes
        for present in (0, 32, 32):
            timeline = await made.carry(made.job(list(range(40)), max_tokens=5), Heard())
            assert (timeline.present_tokens, timeline.retries) == (present, 0)
            await made.until(lambda: all(it.proof for it in reuse._by_link.values()))
        await made.balanced()
