"""Codes of eight bits: how far they are from the numbers, and that they are a function of them."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.coded import Encoder, decode
from transfer.coding import CODECS, coded_layout, plain_layout
from transfer.contract import KVSlice, Source
from transfer.errors import LayoutMismatch
from transfer.layout import KVLayout
from transfer.plan import plan

DIM, HEADS, LAYERS = 8, 2, 3
CANONICAL = ("block", "token", "layer", "kv", "head", "dim")
ONE = KVLayout(
    model="m", weights="float32", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="float32",
    block_tokens=5, rope="half", axes="token layer kv block head dim",
)  # fmt: skip
OTHER = msgspec.structs.replace(
    ONE, block_tokens=4, rope="interleaved", axes="block layer kv head token dim"
)
MOST = {"int8": 127, "float8_e4m3": 448}


def laid_out(layout, numbers, blocks, pool_blocks):
    """A pool of float32 with `numbers` [token, layer, kv, head, dim] in `blocks`."""
    words = layout.order
    pool = np.zeros(tuple(layout.sizes(pool_blocks).values()), np.float32)
    view = pool.transpose(
        [words.index(it) for it in ("block", "token", "layer", "kv", "head", "dim")]
    )
    for token, values in enumerate(numbers):
        view[blocks[token // layout.block_tokens], token % layout.block_tokens] = values
    return pool


def taken(layout, pool, blocks, tokens, pool_blocks):
    """The reverse of `laid_out`."""
    words = layout.order
    view = pool.reshape(tuple(layout.sizes(pool_blocks).values()))
    view = view.transpose(
        [words.index(it) for it in ("block", "token", "layer", "kv", "head", "dim")]
    )
    size = layout.block_tokens
    return np.array([view[blocks[it // size], it % size] for it in range(tokens)])


def scales_of(numbers, codec):
    """The scale of each number [token, layer, kv, head, dim], as `coding.py` defines them."""
    sizes = np.abs(numbers)
    scales = np.repeat(sizes.max(axis=-1, keepdims=True), DIM, axis=-1)
    for start in range(0, len(numbers), DIM):
        group = slice(start, start + DIM)
        scales[group, :, 0] = sizes[group, :, 0].max(axis=0)
    return (scales / np.float32(MOST[codec])).astype(np.float16).astype(np.float32)


def through(numbers, codec, source=ONE, target=OTHER, cuts=()):
    """Codes of `numbers` encoded from `source` in slices, and what they are decoded to."""
    tokens = len(numbers)
    pool_blocks = 40
    blocks = tuple(range(3, 3 + source.blocks_for(tokens)))[::-1]
    coded = coded_layout(target, codec)
    groups = coded.blocks_for(tokens)
    buffer = np.zeros(groups * coded.block_bytes, np.uint8)
    buffer[:] = 0x55  # of an earlier handoff
    codes = Source(coded, buffer, groups, tuple(range(groups)), groups * DIM)
    origin = Source(
        source, laid_out(source, numbers, blocks, pool_blocks), pool_blocks, blocks, tokens
    )
    encoder = Encoder(plan(source, plain_layout(target)), origin, codes, codec)
    edges = sorted({0, tokens, *(it * DIM for it in cuts if it * DIM < tokens)})
    for start, end in itertools.pairwise(edges):
        encoder.encode(KVSlice(0, start, end, 1))
        encoder.encode(KVSlice(1, start, end, LAYERS - 1))
    there = tuple(range(7, 7 + target.blocks_for(tokens)))
    pool = np.zeros(pool_blocks * target.block_bytes, np.uint8)
    decode(codec, codes, tokens, target, pool, pool_blocks, there, lambda: True)
    assert not pool.any(), "nobody wants it any more"
    decode(codec, codes, tokens, target, pool, pool_blocks, there)
    kind = np.float32 if target.dtype == "float32" else np.uint16
    return buffer, taken(target, pool.view(kind), there, tokens, pool_blocks)


def numbers_of(tokens, seed, spread=2.0):
    random = np.random.default_rng(seed)
    numbers = random.standard_normal((tokens, LAYERS, 2, HEADS, DIM), np.float32)
    return numbers * np.exp(spread * random.standard_normal((1, LAYERS, 2, HEADS, DIM))).astype(
        "f4"
    )


def interleaved(numbers):
    """K, whose pairs `OTHER` keeps side by side."""
    paired = numbers.copy()
    paired[:, :, 0, :, ::2], paired[:, :, 0, :, 1::2] = (
        numbers[:, :, 0, :, : DIM // 2],
        numbers[:, :, 0, :, DIM // 2 :],
    )
    return paired


@pytest.mark.parametrize("codec", CODECS)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 1 << 30), spread=st.sampled_from([0.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_what_comes_out_is_within_half_a_step_of_its_scale(codec, tokens, seed, spread):
    numbers = interleaved(numbers_of(tokens, seed, spread))
    rope = msgspec.structs.replace(ONE, rope="interleaved")
    _, found = through(numbers, codec, source=rope)
    scales = scales_of(numbers, codec)
    step = scales if codec == "int8" else np.maximum(np.abs(numbers) / 8, scales / 512)
    # A scale is rounded to float16, a small one to a multiple of 2**-24: the largest may be cut.
    bound = 0.5 * step + np.abs(numbers) * 2.0**-10 + MOST[codec] * 2.0**-25
    assert (np.abs(found - numbers) <= bound).all()
    assert np.abs(found - numbers).max() > 0


@given(tokens=st.integers(1, 40), cuts=st.lists(st.integers(0, 5)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_codes_are_the_same_however_the_prefix_is_cut_and_wherever_it_lies(tokens, cuts, seed):
    numbers = numbers_of(tokens, seed)
    once, found = through(numbers, "int8")
    again, _ = through(numbers, "int8", cuts=cuts)
    assert (once == again).all()
    elsewhere = msgspec.structs.replace(ONE, block_tokens=16, axes="layer kv block head token dim")
    moved, same = through(numbers, "int8", source=elsewhere)
    assert (once == moved).all()
    assert (found == same).all()


def test_k_is_paired_anew_before_it_is_encoded():
    numbers = numbers_of(20, 3)
    _, found = through(numbers, "int8")
    wanted = interleaved(numbers)
    assert np.abs(found - wanted).max() < np.abs(wanted).max() / 100


def test_an_outlying_channel_of_k_costs_the_others_nothing():
    numbers = numbers_of(DIM + 3, 5, spread=0.0)
    numbers[:, :, 0, :, 2] *= 100
    target = msgspec.structs.replace(OTHER, rope="half")
    _, found = through(numbers, "int8", target=target)
    wrong = np.abs(found - numbers)[:, :, 0]
    others = [it for it in range(DIM) if it != 2]
    assert wrong[..., others].max() < 0.03
    assert wrong[..., 2].max() > 0.3


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros_and_a_number_that_is_none_spoils_its_own_scale_alone(codec):
    numbers = numbers_of(2 * DIM, 9)
    numbers[:, 1] = 0
    numbers[3, 0, 0, 1, 2] = np.nan  # K: the channel of its group
    numbers[4, 0, 1, 0, 5] = np.inf  # V: its token
    _, found = through(numbers, codec, target=msgspec.structs.replace(OTHER, rope="half"))
    spoiled = np.zeros_like(numbers, bool)
    spoiled[:DIM, 0, 0, 1, 2] = spoiled[4, 0, 1, 0] = True
    assert (np.isnan(found) == spoiled).all()
    assert (found[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"planes": 1, "kv_heads": 1}, "planes"),
        ({"windows": (0, 4, 0)}, "windows"),
        ({"dtype": "float8_e4m3"}, "dtype"),
        ({"head_dim": 512}, "head_dim"),
    ],
)
def test_a_pool_without_codes_is_refused_with_the_reason(change, field):
    with pytest.raises(LayoutMismatch, match=field):
        coded_layout(msgspec.structs.replace(OTHER, **change), "int8")


def test_no_plan_leads_from_codes_to_numbers_or_other_codes():
    coded = coded_layout(OTHER, "int8")
    for other in (OTHER, coded_layout(OTHER, "float8_e4m3")):
        with pytest.raises(LayoutMismatch):
            plan(coded, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_are_decoded_into_a_pool_of_sixteen_bits(dtype):
    numbers = numbers_of(20, 4, spread=0.0)
    target = msgspec.structs.replace(OTHER, rope="half", dtype=dtype)
    _, found = through(numbers, "int8", target=target)
    bits = found.astype(np.uint32) << 16
    wide = bits.view(np.float32) if dtype == "bfloat16" else found.view(np.float16)
    assert np.abs(wide.astype(np.float32) - numbers).max() < 0.03
