"""Every conversion agrees with an oracle that moves one number at a time."""

import itertools

import msgspec
import numba.core.dispatcher
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from oracle import cast, pair

from transfer import kernels
from transfer.contract import KVSlice, Source, whole
from transfer.convert import Conversion
from transfer.digest import PrefixDigest
from transfer.errors import PeerMisbehaved
from transfer.kernels import copy_runs
from transfer.landings import Expected
from transfer.layout import Epoch, KVLayout, Landing
from transfer.plan import plan
from transfer.pool import Pool
from transfer.rows import scatter

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


def dim_in_target(source, target, kv, dim):
    """Where a number of K goes when the RoPE pairing changes."""
    half = source.head_dim // 2
    if kv == 1 or source.rope == target.rope:
        return dim
    if source.rope == "half":
        return 2 * dim if dim < half else 2 * (dim - half) + 1
    return dim // 2 if dim % 2 == 0 else half + dim // 2


def source_of(layout, pool_blocks, blocks, tokens, seed=0):
    random = np.random.default_rng(seed)
    items = pool_blocks * layout.block_bytes // layout.item_bytes
    numbers = random.standard_normal(items, dtype=np.float32).view(np.uint32)
    return Source(layout, cast(numbers, "float32", layout.dtype), pool_blocks, blocks, tokens)


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


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_a_conversion_agrees_with_the_oracle(drawn):
    tokens, there, here, slices = drawn
    source, landing = source_of(*there, tokens), landing_of(*here, tokens)
    ours, theirs = source.layout, landing.layout
    wanted = np.full(landing.pool_blocks * theirs.block_bytes, 0xAB, np.uint8)
    got = wanted.copy()
    rounded = cast(np.asarray(source.pool), ours.dtype, theirs.dtype)
    numbers = wanted.view(WORDS[theirs.dtype])
    for place in itertools.product(
        range(ours.layers), range(2), range(tokens), range(ours.kv_heads), range(ours.head_dim)
    ):
        *outer, dim = place
        to = (*outer, dim_in_target(ours, theirs, place[1], dim))
        numbers[number_at(*here, *to)] = rounded[number_at(*there, *place)]

    conversion = Conversion(plan(ours, theirs), source, landing)
    expected = Expected(landing, got, lambda: None, lambda _: b"", lambda _: None)
    for part in slices:
        for frame in conversion.frames(part):
            assert frame.data.size == frame.lengths.sum()
            expected.check(frame.offsets, frame.lengths)
            scatter(frame.data, frame.offsets + got.ctypes.data, frame.lengths)

    assert (got == wanted).all()
    digest = found_digest(landing, got)
    assert sent_digest(source, theirs, slices) == digest

    straight = np.full(landing.pool_blocks * theirs.block_bytes, 0xAB, np.uint8)
    summed = digest_of(source, theirs)
    for part in slices:
        conversion.write(part, Pool.of(theirs, landing.pool_blocks, straight), summed)
    assert (straight == wanted).all()
    assert summed.result() == digest
    if conversion.verbatim:
        moved = np.full(landing.pool_blocks * theirs.block_bytes, 0xAB, np.uint8)
        for part in slices:
            addresses, offsets, lengths = conversion.moves(part)
            expected.check(offsets, lengths)
            copy_runs(addresses, offsets + moved.ctypes.data, lengths)
        assert (moved == wanted).all()
    else:
        with pytest.raises(ValueError, match="as it is"):
            conversion.moves(slices[0])


def digest_of(source, target):
    return PrefixDigest(
        plan(source.layout, target),
        source.pool,
        source.pool_blocks,
        source.blocks,
        source.tokens,
        b"key",
    )


def sent_digest(source, target, slices):
    digest = digest_of(source, target)
    for part in slices:
        digest.add(part)
    return digest.result()


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
    kernels.warm_up()
    compiled = {
        name: it
        for name, it in vars(kernels).items()
        if isinstance(it, numba.core.dispatcher.Dispatcher)
    }
    before = {name: list(it.signatures) for name, it in compiled.items()}
    for ours, theirs in ((source, source), (source, target)):
        there, landing = source_of(ours, 3, (2, 0, 1), 11), landing_of(theirs, 3, (0, 2, 1), 11)
        conversion = Conversion(plan(ours, theirs), there, landing)
        regions = [
            np.zeros(3 * theirs.block_bytes // theirs.regions(3), np.uint8)
            for _ in range(theirs.regions(3))
        ]
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


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan_and_infinity():
    cases = {
        0x3F808000: 0x3F80,  # half way, down to even
        0x3F818000: 0x3F82,  # half way, up to even
        0x3F808001: 0x3F81,
        0x3F807FFF: 0x3F80,
        0x7F7FFFFF: 0x7F80,  # rounds up to infinity
        0x7F800000: 0x7F80,
        0xFF800000: 0xFF80,
        0x7F800001: 0x7FC0,  # a NaN stays one, though its payload would be cut off
        0xFFFFFFFF: 0xFFC0,
        0x80000000: 0x8000,
    }
    words = np.array(list(cases), np.uint32)
    assert cast(words, "float32", "bfloat16").tolist() == list(cases.values())


def test_every_16_bit_number_survives_widening():
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for narrow, quiet in (("bfloat16", 0x7FC0), ("float16", 0x7E00)):
        back = cast(cast(every, narrow, "float32"), "float32", narrow)
        mantissa = 0x7F if narrow == "bfloat16" else 0x3FF
        nan = ((every & (quiet & ~mantissa)) == (quiet & ~mantissa)) & ((every & mantissa) != 0)
        assert (back[~nan] == every[~nan]).all()
        assert (back[nan] == ((every[nan] & 0x8000) | quiet)).all()


def test_float16_overflows_to_infinity_and_rounds_to_even():
    numbers = np.array([65504.0, 65520.0, -1e9, 2049.0, 2051.0, 1e-9], np.float32)
    halves = cast(numbers.view(np.uint32), "float32", "float16").view(np.float16)
    assert halves.tolist() == [65504.0, np.inf, -np.inf, 2048.0, 2052.0, 0.0]


def test_pairing_there_and_back_is_where_we_began():
    words = np.arange(12, dtype=np.uint16).reshape(2, 6)
    there = pair(words, "half to interleaved")
    assert there[0].tolist() == [0, 3, 1, 4, 2, 5]
    assert (pair(there, "interleaved to half") == words).all()
