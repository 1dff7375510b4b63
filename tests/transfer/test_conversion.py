"""Slices, frames and digests; `test_any_layout.py` checks what is in them."""

import itertools

import msgspec
import numba.core.dispatcher
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from transfer import kernels, sockets, taking, walking
from transfer.bounds import Bounds
from transfer.contract import KVSlice, Source, whole
from transfer.convert import Conversion
from transfer.digest import PrefixDigest
from transfer.errors import PeerMisbehaved
from transfer.layout import Epoch, KVLayout, Landing, Shard
from transfer.plan import plan
from transfer.pool import Pool
from transfer.rows import scatter
from transfer.warming import warm_up

OUTER = ("layer", "kv", "block", "head", "token")
WORDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


@some.composite
def pairs(draw):
    """Two layouts of one model, each with blocks of a prefix, and a way to slice it."""
    shape = {
        "model": "m",
        "weights": "w",
        "layers": draw(some.integers(1, 3)),
        "kv_heads": draw(some.integers(1, 3)),
        "head_dim": 2 * draw(some.integers(1, 5)),
    }

    def side(tokens):
        layout = KVLayout(
            **shape,
            dtype=draw(some.sampled_from(sorted(WORDS))),
            block_tokens=draw(some.integers(1, 7)),
            rope=draw(some.sampled_from(("half", "interleaved"))),
            axes=" ".join(draw(some.permutations(OUTER))) + " dim",
        )
        needed = layout.blocks_for(tokens)
        pool_blocks = needed + draw(some.integers(0, 3))
        blocks = tuple(draw(some.permutations(range(pool_blocks)))[:needed])
        return layout, pool_blocks, blocks

    tokens = draw(some.integers(1, 20))
    cuts = sorted(draw(some.sets(some.integers(0, tokens), max_size=3)) | {0, tokens})
    slices = [
        KVSlice(layer, start, end)
        for layer in range(shape["layers"])
        for start, end in itertools.pairwise(cuts)
    ]
    return tokens, side(tokens), side(tokens), draw(some.permutations(slices))


def number_at(layout, pool_blocks, blocks, layer, kv, token, head, dim):
    """Index of one number in a pool, by the definition of a layout."""
    block, within = divmod(token, layout.block_tokens)
    at = {"layer": layer, "kv": kv, "block": blocks[block], "token": within, "head": head}
    index = 0
    for axis, size in layout.sizes(pool_blocks).items():
        index = index * size + (dim if axis == "dim" else at[axis])
    return index


def source_of(layout, pool_blocks, blocks, tokens, seed=0):
    random = np.random.default_rng(seed)
    items = pool_blocks * layout.block_bytes // layout.item_bytes
    words = random.integers(0, 1 << 8 * layout.item_bytes, items, dtype=WORDS[layout.dtype])
    return Source(layout, words, pool_blocks, blocks, tokens)


def landing_of(layout, pool_blocks, blocks, tokens):
    return Landing(
        id="l",
        epoch=Epoch(1, 1),
        secret=b"",
        worker="w",
        endpoints=(),
        layout=layout,
        pool_blocks=pool_blocks,
        blocks=blocks,
        tokens=tokens,
        lease_seconds=1.0,
    )


def digest_of(source, target):
    return PrefixDigest(
        plan(source.layout, target),
        source.pool,
        source.pool_blocks,
        source.blocks,
        source.tokens,
        b"key",
    )


def found_digest(landing, pool, key=b"key"):
    digest = PrefixDigest(
        plan(landing.layout, landing.layout),
        pool,
        landing.pool_blocks,
        landing.blocks,
        landing.tokens,
        key,
    )
    digest.add_all()
    return digest.result()


@settings(max_examples=60, deadline=None)
@given(pairs(), some.data())
def test_any_bit_of_the_prefix_changes_the_digest_and_no_other_does(drawn, data):
    tokens, here, _, _ = drawn
    landing = landing_of(*here, tokens)
    layout = landing.layout
    pool = np.random.default_rng(0).integers(
        0, 256, landing.pool_blocks * layout.block_bytes, dtype=np.uint8
    )
    before = found_digest(landing, pool)
    place = data.draw(
        some.tuples(
            some.integers(0, layout.layers - 1),
            some.integers(0, 1),
            some.integers(0, landing.blocks and len(landing.blocks) * layout.block_tokens - 1),
            some.integers(0, layout.kv_heads - 1),
            some.integers(0, layout.head_dim - 1),
        )
    )
    word = pool.view(WORDS[layout.dtype])[number_at(*here, *place) :][:1]
    word ^= word.dtype.type(1 << data.draw(some.integers(0, 8 * layout.item_bytes - 1)))
    in_prefix = place[2] < tokens
    assert (found_digest(landing, pool) != before) == in_prefix


def test_a_warm_process_compiles_nothing_more():
    source = KVLayout(
        model="m", weights="w", layers=2, kv_heads=2, head_dim=4, dtype="float32",
        block_tokens=4, rope="half", axes="token block kv layer head dim",
    )  # fmt: skip
    target = msgspec.structs.replace(
        source, rope="interleaved", dtype="float16", axes="layer | block kv head token dim"
    )
    warm_up()
    compiled = {
        name: it
        for module in (kernels, taking, sockets, walking)
        for name, it in vars(module).items()
        if isinstance(it, numba.core.dispatcher.Dispatcher)
    }
    before = {name: list(it.signatures) for name, it in compiled.items()}
    for ours, theirs in ((source, source), (source, target)):
        there, landing = source_of(ours, 3, (2, 0, 1), 11), landing_of(theirs, 3, (0, 2, 1), 11)
        conversion = Conversion(plan(ours, theirs), there, landing)
        [numbers] = theirs.tables(3)
        size = numbers.nbytes // numbers.regions
        regions = [np.zeros(size, np.uint8) for _ in range(numbers.regions)]
        pool = Pool.of(theirs, 3, regions)
        for part in whole(2, 11):
            conversion.write(part, pool, digest_of(there, theirs))
            for frame in conversion.frames(part):
                frozen = frame.lengths.copy()
                frozen.flags.writeable = False
                scatter(bytes(frame.data), pool.addresses(frame.offsets), frozen)
        found_digest(landing, regions)
    assert {name: list(it.signatures) for name, it in compiled.items()} == before
    assert all(before[it] for it in ("move", "add_tiles", "copy_runs"))


def test_two_flips_of_the_highest_bit_do_not_cancel_out():
    layout = KVLayout(
        model="m", weights="w", layers=1, kv_heads=1, head_dim=8, dtype="float32",
        block_tokens=4, rope="half",
    )  # fmt: skip
    landing = landing_of(layout, 1, (0,), 4)
    pool = np.zeros(layout.block_bytes, np.uint8)
    before = found_digest(landing, pool)
    seen = {before}
    for one, other in itertools.combinations(range(7, 64, 8), 2):
        pool[[one, other]] ^= 0x80
        seen.add(found_digest(landing, pool))
        pool[[one, other]] ^= 0x80
    assert len(seen) == 1 + 28
    assert found_digest(landing, pool, b"another landing") != before


def test_adjacent_blocks_merge_into_one_run():
    source = KVLayout(
        model="m", weights="w", layers=2, kv_heads=2, head_dim=4, dtype="float32",
        block_tokens=4, rope="half", axes="layer kv block token head dim",
    )  # fmt: skip
    there = source_of(source, 8, (0, 1, 2), 12)
    merged = landing_of(source, 8, (5, 6, 7), 12)
    scattered = landing_of(source, 8, (1, 3, 5), 12)
    part = KVSlice(1, 0, 12)
    agreed = plan(source, source)
    [frame] = Conversion(agreed, there, merged).frames(part)
    assert frame.lengths.tolist() == [12 * 2 * 4 * 4] * 2
    [frame] = Conversion(agreed, there, scattered).frames(part)
    assert len(frame.offsets) == 6


TOKEN_MAJOR = KVLayout(
    model="m", weights="w", layers=2, kv_heads=2, head_dim=4, dtype="float32",
    block_tokens=4, rope="half", axes="layer kv block token head dim",
)  # fmt: skip
HEAD_MAJOR = msgspec.structs.replace(TOKEN_MAJOR, axes="block layer kv head token dim")


@pytest.mark.parametrize(
    ("ours", "theirs", "from_blocks", "to_blocks", "runs"),
    [
        # One run for each of K and V wherever both have blocks side by side, cut as the two agree.
        (TOKEN_MAJOR, TOKEN_MAJOR, (0, 1, 2), (5, 6, 7), [12 * 32] * 2),
        (TOKEN_MAJOR, TOKEN_MAJOR, (0, 1, 2), (7, 1, 2), [4 * 32, 8 * 32] * 2),
        (TOKEN_MAJOR, TOKEN_MAJOR, (4, 0, 1), (5, 6, 7), [4 * 32, 8 * 32] * 2),
        # A block's K, V, heads and tokens are one run where both have them in the same order.
        (HEAD_MAJOR, HEAD_MAJOR, (0, 1, 2), (1, 3, 5), [4 * 64] * 3),
        # The tokens of a head, where the order differs before that.
        (
            HEAD_MAJOR,
            msgspec.structs.replace(HEAD_MAJOR, axes="layer kv block head token dim"),
            (0, 1, 2), (1, 3, 5), [4 * 32] * 6,
        ),
        # The heads of a token, where blocks differ in size.
        (
            TOKEN_MAJOR, msgspec.structs.replace(TOKEN_MAJOR, block_tokens=3),
            (0, 1, 2), (0, 1, 2, 3), [12 * 32] * 2,
        ),
    ],
)  # fmt: skip
def test_what_lies_together_on_both_sides_is_one_run(ours, theirs, from_blocks, to_blocks, runs):
    conversion = Conversion(
        plan(ours, theirs),
        source_of(ours, 8, from_blocks, 12),
        landing_of(theirs, 8, to_blocks, 12),
    )
    _, _, lengths = conversion.moves(KVSlice(1, 0, 12))
    assert sorted(lengths.tolist()) == sorted(runs)


def test_no_run_crosses_the_border_of_a_region():
    whole_blocks = msgspec.structs.replace(
        TOKEN_MAJOR, layers=1, axes="block layer kv token head dim"
    )
    apart = msgspec.structs.replace(whole_blocks, axes="block | layer kv token head dim")
    for ours, theirs in ((whole_blocks, apart), (apart, whole_blocks), (apart, apart)):
        conversion = Conversion(
            plan(ours, theirs), source_of(ours, 8, (0, 1, 2), 12),
            landing_of(theirs, 8, (2, 3, 4), 12),
        )  # fmt: skip
        _, _, lengths = conversion.moves(KVSlice(0, 0, 12))
        assert lengths.tolist() == [apart.block_bytes] * 3
        part = KVSlice(0, 0, 12)
        runs = [it for frame in conversion.frames(part) for it in frame.lengths.tolist()]
        cut = theirs is apart
        assert runs == ([apart.block_bytes] * 3 if cut else [3 * apart.block_bytes])
    bounds = Bounds(landing_of(apart, 8, (2, 3, 4), 12))
    inside, across = apart.block_bytes, apart.block_bytes + 1
    lengths = np.array([inside, across])
    assert bounds.first_outside(np.array([3 * inside] * 2), lengths) == 1


def test_some_of_the_heads_are_no_row_with_their_planes():
    ours = msgspec.structs.replace(TOKEN_MAJOR, axes="layer block token kv head dim")
    some_heads = plan(ours, ours, heads=Shard(1, 1))
    assert some_heads.inner in (("dim",), ("head", "dim"))
    assert plan(ours, ours).inner == ("kv", "head", "dim")


def test_the_digests_of_shards_add_up_to_that_of_the_whole():
    source = source_of(TOKEN_MAJOR, 3, (2, 0, 1), 11)
    lanes = np.zeros(2, np.uint64)
    for head in range(2):
        agreed = plan(TOKEN_MAJOR, TOKEN_MAJOR, heads=Shard(head, 1))
        digest = PrefixDigest(agreed, source.pool, 3, source.blocks, 11, b"key")
        digest.add_all()
        lanes += np.frombuffer(digest.result(), ">u8").astype(np.uint64)
    landing = landing_of(TOKEN_MAJOR, 3, source.blocks, 11)
    assert lanes.astype(">u8").tobytes() == found_digest(landing, source.pool)


def test_only_the_tokens_that_a_window_keeps_are_moved():
    windowed = msgspec.structs.replace(TOKEN_MAJOR, windows=(0, 5))
    conversion = Conversion(
        plan(TOKEN_MAJOR, windowed), source_of(TOKEN_MAJOR, 8, (0, 1, 2), 12),
        landing_of(windowed, 8, (0, 1, 2), 12),
    )  # fmt: skip
    moved = [
        [conversion.moves(KVSlice(layer, start, 12))[2].sum() for start in (0, 8)]
        for layer in (0, 1)
    ]
    assert moved == [[12 * 64, 4 * 64], [5 * 64, 4 * 64]]
    assert conversion.moves(KVSlice(1, 0, 7))[2].tolist() == []
    assert list(conversion.frames(KVSlice(1, 0, 7))) == []


def test_a_slice_is_converted_in_pieces_of_about_a_mebibyte():
    source = KVLayout(
        model="m", weights="w", layers=1, kv_heads=8, head_dim=128, dtype="float32",
        block_tokens=16, rope="half",
    )  # fmt: skip
    there = source_of(source, 64, tuple(range(64)), 1024)
    frames = Conversion(plan(source, source), there, landing_of(source, 64, there.blocks, 1024))
    sizes = [frame.data.size for frame in frames.frames(KVSlice(0, 0, 1024))]
    assert sum(sizes) == 1024 * source.token_bytes
    assert max(sizes) <= 1 << 20
    assert min(sizes) >= 1 << 19


@pytest.mark.parametrize(
    "part", [KVSlice(2, 0, 1), KVSlice(0, 0, 13), KVSlice(0, 5, 5), KVSlice(0, 6, 5)]
)
def test_a_slice_outside_the_prefix_is_refused(part):
    source = KVLayout(
        model="m", weights="w", layers=2, kv_heads=1, head_dim=2, dtype="float16",
        block_tokens=4, rope="half",
    )  # fmt: skip
    conversion = Conversion(
        plan(source, source),
        source_of(source, 4, (0, 1, 2), 12),
        landing_of(source, 4, (3, 2, 1), 12),
    )
    with pytest.raises(ValueError, match=r"^(layer|start, end): "):
        list(conversion.frames(part))


def test_contradictions_between_pool_blocks_and_tokens_are_refused():
    layout = KVLayout(
        model="m", weights="w", layers=2, kv_heads=1, head_dim=2, dtype="float16",
        block_tokens=4, rope="half",
    )  # fmt: skip
    good = source_of(layout, 4, (0, 1, 2), 12)
    landing = landing_of(layout, 4, (3, 2, 1), 12)
    agreed = plan(layout, layout)
    for field, source in (
        ("blocks", source_of(layout, 4, (0, 1), 12)),
        ("blocks", source_of(layout, 4, (0, 1, 4), 12)),
        ("pool", Source(layout, np.zeros(7, np.uint8), 4, (0, 1, 2), 12)),
    ):
        with pytest.raises(ValueError, match=f"^{field}: "):
            Conversion(agreed, source, landing)
    for field, wrong in (
        ("tokens", landing_of(layout, 4, (3, 2, 1), 11)),
        ("blocks", landing_of(layout, 4, (3, -1, 1), 12)),
        ("blocks", landing_of(layout, 4, (3, 1), 12)),
        ("pool_blocks", landing_of(layout, 1 << 60, (3, 2, 1), 12)),
    ):
        with pytest.raises(PeerMisbehaved, match=f"^landing l: {field}: "):
            Conversion(agreed, good, wrong)
