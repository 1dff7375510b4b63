"""A pool in several regions is one array to everybody but those who copy."""

import ctypes
import tracemalloc

import msgspec
import numpy as np
import pytest

from transfer.layout import KVLayout
from transfer.pool import Pool

LAYOUT = KVLayout(
    model="m", weights="w", layers=2, kv_heads=3, head_dim=4, dtype="float16",
    block_tokens=2, rope="half", axes="layer kv | block token head dim",
)  # fmt: skip
BLOCKS = 5
REGION = BLOCKS * LAYOUT.block_bytes // 4


def byte_at(address):
    return ctypes.c_uint8.from_address(int(address)).value


def test_an_offset_leads_to_its_byte_in_the_right_region():
    regions = [np.random.default_rng(it).integers(0, 256, REGION, np.uint8) for it in range(4)]
    pool = Pool.of(LAYOUT, BLOCKS, regions)
    virtual = np.concatenate(regions)
    offsets = np.array([0, 1, REGION - 1, REGION, 3 * REGION - 1, 3 * REGION, 4 * REGION - 1])
    assert [byte_at(it) for it in pool.addresses(offsets)] == virtual[offsets].tolist()
    assert pool.nbytes == len(virtual)
    parts = pool.parts(REGION - 3, REGION + 5)
    assert [len(it) for it in parts] == [3, REGION, 2]
    assert (np.concatenate(parts) == virtual[REGION - 3 : 2 * REGION + 2]).all()


@pytest.mark.parametrize("buffers", [[np.zeros(8, np.uint8)], np.zeros(8, np.uint8)])
def test_more_regions_than_memory_could_list_are_refused_before_they_are_listed(buffers):
    layout = msgspec.structs.replace(LAYOUT, axes="block layer kv | token head dim")
    tracemalloc.start()
    with pytest.raises(ValueError, match="pool: "):
        Pool.of(layout, 1 << 21, buffers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_regions_side_by_side_are_one_piece():
    memory = np.arange(4 * REGION, dtype=np.uint16).astype(np.uint8)
    whole = Pool.of(LAYOUT, BLOCKS, memory)
    cut = Pool.of(LAYOUT, BLOCKS, list(memory.reshape(4, -1)))
    assert len(cut.tables[0].bases) == 1
    offsets = np.arange(0, 4 * REGION, 7)
    assert (cut.addresses(offsets) == whole.addresses(offsets)).all()
    assert cut.tables[0].region_bytes == whole.tables[0].region_bytes == 4 * REGION


@pytest.mark.parametrize(
    "buffers", [np.zeros(4 * REGION - 1, np.uint8), [np.zeros(REGION, np.uint8)] * 3,
                [np.zeros(REGION + 1, np.uint8)] * 4, []]
)  # fmt: skip
def test_memory_of_another_size_is_refused(buffers):
    with pytest.raises(ValueError, match=r"^pool: "):
        Pool.of(LAYOUT, BLOCKS, buffers)


def test_a_pool_says_whether_it_may_be_written_to():
    assert Pool.of(LAYOUT, BLOCKS, bytearray(4 * REGION)).writable
    assert not Pool.of(LAYOUT, BLOCKS, bytes(4 * REGION)).writable


def test_bytes_beyond_the_pool_have_no_place():
    pool = Pool.of(LAYOUT, BLOCKS, bytearray(4 * REGION))
    with pytest.raises(ValueError, match="not within"):
        pool.parts(4 * REGION - 1, 2)


@pytest.mark.parametrize(
    "axes",
    ["layer kv || block token head dim", "| layer kv block token head dim",
     "layer kv block token head dim |", "layer | kv | block token head dim",
     "layer kv block token dim | head", "layer kv | block token dim"],
)  # fmt: skip
def test_a_bar_in_a_wrong_place_is_refused(axes):
    with pytest.raises((ValueError, msgspec.ValidationError), match=r"axes|region"):
        msgspec.structs.replace(LAYOUT, axes=axes)


def test_a_bar_tells_regions_from_what_lies_in_them():
    assert LAYOUT.apart == ("layer", "kv")
    assert LAYOUT.order == ("layer", "kv", "block", "token", "head", "dim")
    [numbers] = LAYOUT.tables(BLOCKS)
    assert (numbers.regions, numbers.nbytes) == (4, 4 * REGION)
    by_block = msgspec.structs.replace(LAYOUT, axes="block | layer kv token head dim")
    assert by_block.tables(7)[0].regions == 7
