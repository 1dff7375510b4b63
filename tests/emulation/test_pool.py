"""The pool finds every number in every order of axes, and keeps a shadow in step."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from backends.emulation.pool import PagedPool
from backends.emulation.staging import Staging, _Copy
from backends.emulation.synthetic import SyntheticBackend
from transfer.layout import KVLayout, Shard
from transfer.shared_memory import attach, segment_of

ORDERS = [
    " ".join((*order, "dim"))
    for order in itertools.permutations(("layer", "kv", "block", "head", "token"))
]


def layout(axes=ORDERS[0], dtype="float32") -> KVLayout:
    return KVLayout(
        model="m", weights="float32", layers=3, kv_heads=2, head_dim=4, dtype=dtype,
        block_tokens=5, rope="half", axes=axes,
    )  # fmt: skip


@pytest.mark.parametrize("shards", [(), (Shard(0, 1), Shard(1, 1))], ids=["whole", "sharded"])
@pytest.mark.parametrize("axes", ORDERS)
def test_what_is_written_is_gathered_in_order_from_any_axes(axes, shards):
    pool = PagedPool(layout(axes), 7, "cpu", shards=shards)
    blocks, length = np.array([4, 0, 6]), 13
    positions = np.arange(length)
    cells = torch.from_numpy(pool.cells_of(blocks[positions // 5], positions % 5))
    values = torch.randn(3, length, 2, 2, 4)
    for layer in range(3):
        pool.write(layer, cells, values[layer].permute(1, 2, 0, 3).contiguous())
    runs = torch.from_numpy(pool.runs_of(np.stack([blocks, blocks[[1, 1, 2]]])))
    for layer in range(3):
        found = torch.empty(len(runs), pool.run_numbers)
        pool.gather(layer, runs, found)
        found = found.view(2, 2, 2, 15, 4)
        expected = values[layer].permute(1, 2, 0, 3)
        assert torch.equal(found[:, 0, :, :length], expected)
        assert torch.equal(found[:, 1, :, :5], expected[:, :, 5:10])
    cut = layout(axes).sharded(shards)[-1]
    sizes = list(cut.sizes(7).values())
    seen = np.frombuffer(memoryview(pool.buffers[-1]), np.float32).reshape(sizes)
    place = {"layer": 1, "kv": 1, "block": 0, "token": 2, "head": 1 - cut.heads.first, "dim": 3}
    assert seen[tuple(place[axis] for axis in axes.split())] == values[1, 7, 1, 1, 3]


@pytest.mark.parametrize("axes", [ORDERS[0], "head block layer kv token dim"])
def test_every_pool_of_several_is_cleared_and_copied(axes):
    pool = PagedPool(layout(axes), 4, "cpu", shards=(Shard(0, 1), Shard(1, 1)))
    for number, memory in enumerate(pool.buffers):
        memory.view(np.float32)[:] = 5 + number
    pool.begin(np.array([2]), np.array([0]), np.array([1]))
    pool.copy(np.array([2]), np.array([0]))
    whole = 3 * 2 * 4 * 5 * 4
    cleared = 2 * (3 * 2 * 3 * 4)
    for number, memory in enumerate(pool.buffers):
        assert (memory.view(np.float32) == 5 + number).sum() == whole - cleared
        assert (memory.view(np.float32) == 0).sum() == cleared


def test_other_processes_can_map_what_the_host_sees():
    pool = PagedPool(layout(), 7, "cpu")
    assert attach(segment_of(pool.buffer)).nbytes == 7 * layout().block_bytes
    pool.canonical.fill_(9)
    assert (attach(segment_of(pool.buffer)).view(np.float32) == 9).all()
    assert segment_of(SyntheticBackend(pool_tokens=64).pool) is not None


def test_a_new_block_is_cleared_behind_what_is_written_and_no_further():
    pool = PagedPool(layout(), 4, "cpu")
    pool.canonical.fill_(9)
    pool.begin(np.array([2]), np.array([0]), np.array([1]))
    assert (pool.canonical[:, :, 2, 2:] == 0).all()
    assert (pool.canonical[:, :, 2, :2] == 9).all()
    assert (pool.canonical[:, :, [0, 1, 3]] == 9).all()
    pool.canonical[:, :, 2, 3:] = 5
    pool.begin(np.array([2]), np.array([2]), np.array([2]))
    assert (pool.canonical[:, :, 2, 3:] == 5).all(), "known to be clear: not touched again"
    pool.ingest(np.array([2]))
    pool.begin(np.array([2]), np.array([3]), np.array([3]))
    assert (pool.canonical[:, :, 2, 4:] == 0).all(), "others wrote it: cleared"


class Ending:
    """A copy's end, as CUDA tells it."""

    def __init__(self):
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


def test_copies_under_way_land_in_order_once_they_have_ended():
    device, host = torch.ones(3, 2, 4, 5), torch.zeros(3, 2, 4, 5)
    staging, heard = Staging(device, host), []
    endings = [Ending(), Ending()]
    copies = [_Copy(it, partial(heard.append, number)) for number, it in enumerate(endings)]
    staging._under_way.extend(copies)
    endings[1].over = True
    staging.collect(wait=False)
    assert not heard
    staging.collect(wait=True)
    assert heard == [0, 1]
    staging._under_way.extend(copies)
    staging.abandon()
    staging.collect(wait=True)
    assert heard == [0, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_travel_from_the_device_and_back(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; `make test-gpu` says what has run on one")
    pool = torch.randn(3, 2, 4, 5, 2, 8).to(device)
    host, heard = torch.zeros(pool.shape), []
    staging, blocks = Staging(pool, host), torch.tensor([3, 1])
    for layer in range(3):
        staging.send(slice(layer, layer + 1), blocks.to(device), lambda: heard.append(len(heard)))
    staging.collect(wait=True)
    before = pool.cpu().clone()
    pool[:, :, blocks.to(device)] = 0
    assert heard == [0, 1, 2]
    assert torch.equal(host[:, :, blocks], before[:, :, blocks])
    assert not host[:, :, [0, 2]].any()
    staging.fetch(blocks)
    host.zero_()
    assert torch.equal(pool.cpu(), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_shadow_follows_only_when_told(dtype):
    pool = PagedPool(layout(dtype=dtype), 4, "cpu", shadow=True)
    assert not pool.buffer.any()
    pool.canonical.copy_(torch.randn(pool.canonical.shape))
    assert not pool.buffer.any()
    shadow = PagedPool(layout(dtype=dtype), 4, "cpu")

    def host() -> torch.Tensor:
        shadow.buffer[:] = pool.buffer
        return shadow.canonical

    pool.publish(torch.tensor([1, 3]), layer=2)
    assert torch.equal(host()[2, :, [1, 3]], pool.canonical[2, :, [1, 3]])
    assert not host()[:2].any()
    assert not host()[2, :, [0, 2]].any()
    pool.publish(torch.tensor([0]))
    assert torch.equal(host()[:, :, 0], pool.canonical[:, :, 0])
    pool.buffer[:] = 0
    pool.ingest(np.array([3]))
    assert not pool.canonical[:, :, 3].any()
    assert pool.canonical[:, :, 1].any()
    pool.copy(np.array([1]), np.array([2]))
    assert torch.equal(pool.canonical[:, :, 1], pool.canonical[:, :, 2])
    assert torch.equal(host()[:, :, 1], host()[:, :, 2])
