"""KV as codes of eight bits: what a handoff may travel as where the wire is slow. Lossy.

A *coded* layout is cut into groups of as many tokens as a head has numbers. A head's numbers of one
token become as many codes and two bytes of scales after them. K has a scale for each channel of a
group, as its outliers keep to a few of them: the two bytes of token i are the scale of channel i.
V has a scale for each token. A last group that is not full is filled up with zeros, and travels as
a whole. To the rest of the data plane such a vector is bytes: it is moved and proven as it is, and
has no other reader than `decode_groups`.

Scales are float16, the largest magnitude divided by the largest code; where all are below 0.03 that
is coarse, and a number may be off by 2**-16 more. A code is its number times the scale's
reciprocal, rounded to nearest (ties to even). What holds a NaN or an infinity, or is too large for
such a scale, gets the scale NaN and zeros. The same numbers give the same codes, and the same codes
the same numbers, on every machine.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec
import numpy as np

from transfer.errors import LayoutMismatch
from transfer.layout import ITEM_BYTES, KVLayout
from transfer.raw import as_bits, as_float, compiled, inlined, load32, store8, store32
from transfer.rounding import (
    FLOAT16,
    MAGNITUDE,
    U32,
    encode,
    largest,
    narrow,
    scale_up,
    settle,
    widen,
)

Codec = Literal["int8", "float8_e4m3"]
CODECS: tuple[Codec, ...] = get_args(Codec)

SCALE_BYTES = 2
AXES = "block layer kv head token dim"
MOST_DIM = 256
MARK = " as "
FLOAT_BYTES = ITEM_BYTES["float32"]


def plain_layout(target: KVLayout) -> KVLayout:
    """The numbers that are encoded, in float32, in groups: a pool of no worker.

    Raises:
        LayoutMismatch: there are no codes for such a pool; says why.
    """
    dim = target.head_dim
    if target.planes != 2:
        raise LayoutMismatch("planes: there are no codes for a latent")
    if target.windows:
        raise LayoutMismatch("windows: there are no codes where layers keep only the last tokens")
    if target.dtype not in ("float32", "float16", "bfloat16"):
        raise LayoutMismatch(f"dtype: {target.dtype} is as short as codes are")
    if not 2 <= dim <= MOST_DIM:
        raise LayoutMismatch(f"head_dim: there are no codes for {dim} numbers")
    return msgspec.structs.replace(target, dtype="float32", block_tokens=dim, axes=AXES)


def coded_layout(target: KVLayout, codec: Codec) -> KVLayout:
    """How what travels to a pool of `target` lies where it lands; raises as `plain_layout`.

    Its `model` says what it is, so that no plan leads from or to anything else; its dtype is that
    of bytes which are moved as they are.
    """
    plain = plain_layout(target)
    return msgspec.structs.replace(
        plain,
        model=f"{target.model}{MARK}{codec}",
        dtype="float8_e4m3",
        head_dim=plain.head_dim + SCALE_BYTES,
    )


def scratch_bytes(dim: int) -> int:
    """Room that encoding and decoding need."""
    return 3 * dim * FLOAT_BYTES


@inlined
def _group_at(base: int, group: int, layers: int, layer: int, plane: int, heads: int, head: int,
              dim: int) -> int:  # fmt: skip
    """Where the codes of one head of a group begin."""
    place = ((group * layers + layer) * 2 + plane) * heads + head
    return base + place * dim * (dim + SCALE_BYTES)


@inlined
def _inverse(bits: Any) -> Any:
    """The reciprocal of a scale; 0 where it is 0 or NaN."""
    scale = as_float(bits)
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@inlined
def _fill_up(codes: int, count: int, dim: int, size: int) -> None:
    """Zeros instead of the codes, or all, of a group's vectors from number `count` on."""
    for t in range(count, dim):
        for i in range(size):
            store8(codes + (dim + SCALE_BYTES) * t, i, np.uint8(0))


@compiled
def _encode_by_channel(
    kind: int, floats: int, count: int, dim: int, codes: int, scratch: int
) -> None:
    """The `count` vectors of a group, with `dim` scales for all of them together."""
    scales, inverse, row = scratch, scratch + 4 * dim, scratch + 8 * dim
    for d in range(dim):
        store32(scales, d, U32(0))
    for t in range(count):
        vector = floats + 4 * dim * t
        for d in range(dim):
            most = max(U32(load32(vector, d) & MAGNITUDE), load32(scales, d))
            store32(scales, d, most)
    settle(scales, dim, kind, FLOAT16, row)
    for d in range(dim):
        store32(inverse, d, as_bits(_inverse(load32(scales, d))))
    for t in range(count):
        vector, to = floats + 4 * dim * t, codes + (dim + SCALE_BYTES) * t
        for d in range(dim):
            factor = as_float(load32(inverse, d))
            scaled = as_float(load32(vector, d)) * factor
            store32(row, d, as_bits(scaled if factor > 0 else np.float32(0)))
        encode(kind, row, to, dim, np.float32(1))
    _fill_up(codes, count, dim, dim)
    for t in range(dim):
        narrow(FLOAT16, scales + 4 * t, codes + (dim + SCALE_BYTES) * t + dim, 1)


@compiled
def _encode_by_token(
    kind: int, floats: int, count: int, dim: int, codes: int, scratch: int
) -> None:
    """The `count` vectors of a group, with a scale each."""
    scale, row = scratch, scratch + 8 * dim
    for t in range(count):
        vector, to = floats + 4 * dim * t, codes + (dim + SCALE_BYTES) * t
        store32(scale, 0, largest(vector, dim))
        settle(scale, 1, kind, FLOAT16, row)
        factor = _inverse(load32(scale, 0))
        for d in range(dim):
            scaled = as_float(load32(vector, d)) * factor
            store32(row, d, as_bits(scaled if factor > 0 else np.float32(0)))
        encode(kind, row, to, dim, np.float32(1))
        narrow(FLOAT16, scale, to + dim, 1)
    _fill_up(codes, count, dim, dim + SCALE_BYTES)


@compiled
def encode_layer(
    kind: int, floats: int, first: int, tokens: int, heads: int, dim: int, layer: int, layers: int,
    base: int, scratch: int,
) -> None:  # fmt: skip
    """Encode `tokens` tokens of one layer, from group `first` on, into a coded pool at `base`.

    They lie at `floats` without gaps: group, K and V, head, token, number. The last group of a
    prefix may be less than full.
    """
    for group in range(-(-tokens // dim)):
        count = min(dim, tokens - group * dim)
        for plane in range(2):
            for head in range(heads):
                to = _group_at(base, first + group, layers, layer, plane, heads, head, dim)
                if plane == 0:
                    _encode_by_channel(kind, floats, count, dim, to, scratch)
                else:
                    _encode_by_token(kind, floats, count, dim, to, scratch)
                floats += count * dim * FLOAT_BYTES


@compiled
def decode_groups(
    kind: int, base: int, blocks: Any, first: int, tokens: int, heads: int, dim: int, layers: int,
    floats: int, scratch: int,
) -> None:  # fmt: skip
    """Decode `tokens` tokens of all layers into a plain pool at `floats`, from its start on.

    They lie in `blocks` of the coded pool at `base`, from the one with number `first` on.
    """
    size = dim + SCALE_BYTES
    for group in range(-(-tokens // dim)):
        count = min(dim, tokens - group * dim)
        for layer in range(layers):
            for plane in range(2):
                for head in range(heads):
                    codes = _group_at(
                        base, blocks[first + group], layers, layer, plane, heads, head, dim
                    )  # fmt: skip
                    to = floats + FLOAT_BYTES * dim * dim * (
                        ((group * layers + layer) * 2 + plane) * heads + head
                    )
                    for t in range(dim):
                        widen(FLOAT16, codes + size * t + dim, scratch + 4 * t, 1)
                    for t in range(count):
                        row = to + 4 * dim * t
                        widen(kind, codes + size * t, row, dim)
                        if plane == 0:
                            for d in range(dim):
                                number = as_float(load32(row, d)) * as_float(load32(scratch, d))
                                store32(row, d, as_bits(number))
                        else:
                            scale_up(row, dim, as_float(load32(scratch, t)))
