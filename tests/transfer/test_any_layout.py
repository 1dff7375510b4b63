"""Any layout to any other, checked number by number against `naive.py`."""

import itertools
import os

import numpy as np
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as some
from naive import SIZE, Naive, convert

from transfer.bounds import Bounds
from transfer.contract import KVSlice, Source
from transfer.convert import Conversion
from transfer.digest import PrefixDigest, apart
from transfer.errors import LayoutMismatch
from transfer.kernels import copy_runs
from transfer.layout import Epoch, KVLayout, Landing, Scales, Shard
from transfer.plan import plan
from transfer.pool import Pool
from transfer.rows import scatter

EXAMPLES = int(os.environ.get("BATON_EXAMPLES", "150"))
SPECIALS = (0.0, -0.0, 1e-40, -1e-6, 449.0, 1e5, -3e38)
NOT_NUMBERS = (float("inf"), -float("inf"), float("nan"))


def with_bar(draw, axes):
    """Axes in some order, perhaps with a bar."""
    bar = draw(some.integers(0, len(axes) - 1))
    return " ".join([*axes[:bar], *(["|"] if bar else []), *axes[bar:]])


@some.composite
def layouts(draw, shape, sharded):
    """A layout of a model of this shape."""
    optional = ([] if shape["planes"] == 1 else ["kv"]) + (
        [] if shape["kv_heads"] == 1 else ["head"]
    )
    spare = [it for it in ("kv", "head") if it not in optional and draw(some.booleans())]
    axes = draw(some.permutations(["layer", "block", "token", *optional, *spare]))
    dtype = draw(some.sampled_from(sorted(SIZE)))
    scales = None
    if dtype == "int8" or (dtype == "float8_e4m3" and draw(some.booleans())):
        shared = [it for it in ("kv", "head") if draw(some.booleans())]
        groups = draw(some.permutations(["layer", "block", "token", *shared]))
        kind = draw(some.sampled_from(["float32", "float16", "bfloat16"]))
        scales = Scales(with_bar(draw, groups), kind)
    shard = None
    if sharded and shape["kv_heads"] > 1:
        first = draw(some.integers(0, shape["kv_heads"] - 1))
        shard = Shard(first, draw(some.integers(1, shape["kv_heads"] - first)))
    return KVLayout(
        **shape,
        dtype=dtype,
        block_tokens=draw(some.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 256])),
        rope=draw(some.sampled_from(("half", "interleaved"))),
        axes=with_bar(draw, [*axes, "dim"]),
        scales=scales,
        shard=shard,
        windows=tuple(draw(some.lists(some.integers(0, 9), min_size=2, max_size=2)))
        if shape["layers"] == 2 and draw(some.booleans())
        else (),
    )


@some.composite
def handoffs(draw):
    """Two layouts of one model that can be converted, blocks in either pool, and slices."""
    planes = draw(some.sampled_from([1, 2, 2]))
    dim = draw(some.integers(1, 9))
    shape = {
        "model": "m", "weights": "w", "layers": draw(some.integers(1, 2)), "planes": planes,
        "kv_heads": 1 if planes == 1 else draw(some.integers(1, 4)), "head_dim": dim,
        "rotary": (0, dim) if planes == 1 else None,
    }  # fmt: skip
    if dim > 2 and draw(some.booleans()):
        first = draw(some.integers(0, dim - 2))
        shape["rotary"] = (first, first + 2 * draw(some.integers(1, (dim - first) // 2)))
    sharded = draw(some.booleans())
    tokens = draw(some.integers(1, 20))
    ours, theirs = (draw(layouts(shape, sharded)) for _ in range(2))
    try:
        agreed = plan(ours, theirs)
    except LayoutMismatch:
        reject()
    sides = []
    for layout in (ours, theirs):
        needed = layout.blocks_for(tokens)
        pool_blocks = needed + draw(some.integers(0, 3))
        blocks = tuple(draw(some.permutations(range(pool_blocks)))[:needed])
        sides.append((layout, pool_blocks, blocks))
    cuts = sorted(draw(some.sets(some.integers(0, tokens), max_size=3)) | {0, tokens})
    slices = []
    for start, end in itertools.pairwise(cuts):
        step = draw(some.integers(1, shape["layers"]))
        slices += [KVSlice(it, start, end, step) for it in range(0, shape["layers"], step)]
    return agreed, tokens, sides, draw(some.permutations(slices)), draw(some.integers(0, 2**32))


def pool_full(layout, pool_blocks, seed, special):
    """A pool of numbers of every kind, with scales of all sizes."""
    random = np.random.default_rng(seed)
    items = layout.tables(pool_blocks)
    parts = []
    for table, dtype in zip(
        items, (layout.dtype, layout.scales and layout.scales.dtype), strict=False
    ):
        count = table.nbytes // SIZE[dtype]
        numbers = random.standard_normal(count, dtype=np.float32)
        numbers *= np.float32(2.0) ** random.integers(-9, 9, count).astype(np.float32)
        odd = random.random(count) < 0.03
        numbers[odd] = random.choice(np.array(special, np.float32), int(odd.sum()))
        with np.errstate(all="ignore"):
            if dtype == "float32":
                raw = numbers
            elif dtype == "bfloat16":
                raw = (numbers.view(np.uint32) >> 16).astype(np.uint16)
            elif dtype == "float16":
                raw = numbers.astype(np.float16)
            else:
                raw = random.integers(0, 256, count).astype(np.uint8)
        parts.append(raw.view(np.uint8))
    return np.concatenate(parts)


def landing_of(layout, pool_blocks, blocks, tokens, heads):
    return Landing(
        id="l", epoch=Epoch(1, 1), secret=b"", worker="w", endpoints=(), layout=layout,
        pool_blocks=pool_blocks, blocks=blocks, tokens=tokens, lease_seconds=1.0, heads=heads,
    )  # fmt: skip


def regions_of(layout, pool_blocks, memory):
    """The same bytes, in one buffer for each region."""
    regions, at = [], 0
    for table in layout.tables(pool_blocks):
        size = table.nbytes // table.regions
        for _ in range(table.regions):
            regions.append(memory[at : at + size].copy())
            at += size
    return regions


@settings(
    max_examples=int(os.environ.get("BATON_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(handoffs(), some.booleans())
def test_every_conversion_agrees_with_the_naive_one(drawn, with_nan):
    agreed, tokens, ((ours, from_blocks, here), (theirs, to_blocks, there)), slices, seed = drawn
    memory = pool_full(ours, from_blocks, seed, SPECIALS + NOT_NUMBERS * with_nan)
    before = np.random.default_rng(seed).integers(0, 256, to_blocks * theirs.block_bytes, np.uint8)
    wanted = before.copy()
    heads = range(agreed.heads.first, agreed.heads.end)
    convert(
        Naive(ours, from_blocks, here, memory), Naive(theirs, to_blocks, there, wanted),
        tokens, heads,
    )  # fmt: skip

    pool = regions_of(ours, from_blocks, memory)
    source = Source(ours, pool, from_blocks, here, tokens)
    landing = landing_of(theirs, to_blocks, there, tokens, agreed.heads)
    conversion = Conversion(agreed, source, landing)
    bounds = Bounds(landing)

    straight = regions_of(theirs, to_blocks, before)
    sent = PrefixDigest(agreed, pool, from_blocks, here, tokens, b"key")
    for part in slices:
        conversion.write(part, Pool.of(theirs, to_blocks, straight), sent)
    assert (np.concatenate(straight) == wanted).all()

    framed = before.copy()
    for part in slices:
        for frame in conversion.frames(part):
            assert frame.data.size == frame.lengths.sum()
            assert bounds.first_outside(frame.offsets, frame.lengths) is None
            scatter(frame.data, frame.offsets + framed.ctypes.data, frame.lengths)
    assert (framed == wanted).all()

    if conversion.verbatim:
        moved = regions_of(theirs, to_blocks, before)
        where = Pool.of(theirs, to_blocks, moved)
        for part in slices:
            addresses, offsets, lengths = conversion.moves(part)
            assert bounds.first_outside(offsets, lengths) is None
            copy_runs(addresses, where.addresses(offsets), lengths)
        assert (np.concatenate(moved) == wanted).all()

    received = plan(theirs, theirs, heads=agreed.heads)
    gapless = regions_of(theirs, to_blocks, before)
    itself = Conversion(received, Source(theirs, gapless, to_blocks, there, tokens), landing)
    for part in slices:
        data = np.empty(conversion.size(part), np.uint8)
        conversion.fill(part, data.ctypes.data)
        addresses, _, lengths = itself.moves(part)
        assert lengths.sum() == itself.size(part) == data.size
        copy_runs(np.cumsum(lengths) - lengths + data.ctypes.data, addresses, lengths)
    assert (np.concatenate(gapless) == wanted).all()

    size = theirs.block_tokens
    found = PrefixDigest(received, wanted, to_blocks, there, tokens, b"key", size)
    found.add_all()
    assert sent.result() == found.result()

    block = seed % theirs.blocks_for(tokens)
    alone = PrefixDigest(agreed, pool, from_blocks, here, tokens, b"key")
    for layer in range(theirs.layers):
        alone.add(KVSlice(layer, block * size, min(tokens, block * size + size)))
    assert apart(found.parts())[block] == alone.result()
