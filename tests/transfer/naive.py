"""What a conversion must do, one number at a time, from the words of `layout.py` alone.

Nothing here is shared with the code under test but the structs: places are computed from the axes,
numbers in plain Python and float64, codes by looking for the nearest one.
"""

import math
import struct

import numpy as np

QUIET = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0, "float8_e4m3": 0x7F}
SIGN = {"float32": 31, "float16": 15, "bfloat16": 15, "float8_e4m3": 7}
SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "int8": 1}


def eighth(code):
    """The value of a float8_e4m3 code without its sign."""
    exponent, fraction = code >> 3, code & 7
    if exponent == 0:
        return fraction / 8 * 2.0**-6
    return (1 + fraction / 8) * 2.0 ** (exponent - 7)


EIGHTHS = [eighth(code) for code in range(127)]


def value(bits, dtype):
    """A number's value, exactly."""
    if dtype == "float32":
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    if dtype == "bfloat16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    if dtype == "float16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    if dtype == "int8":
        return float(bits - 256 if bits > 127 else bits)
    size = math.nan if bits & 0x7F == 0x7F else EIGHTHS[bits & 0x7F]
    return math.copysign(size, -1 if bits & 0x80 else 1)


def to_bits(number, dtype, negative):
    """The nearest number of a dtype; `negative` is the sign bit of what it was, for a NaN."""
    sign = int(negative) << SIGN[dtype]
    if math.isnan(number):
        return sign | QUIET[dtype]
    number = abs(number)
    if dtype == "float8_e4m3":
        if number >= 448:
            return sign | 0x7E
        gaps = [abs(number - it) for it in EIGHTHS]
        nearest = [code for code, gap in enumerate(gaps) if gap == min(gaps)]
        return sign | next((it for it in nearest if it % 2 == 0), nearest[0])
    if dtype == "float32":
        return sign | struct.unpack("<I", struct.pack("<f", number))[0]
    if dtype == "float16":
        if number >= 65520:
            return sign | 0x7C00
        return sign | struct.unpack("<H", struct.pack("<e", number))[0]
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    low, high = bits >> 16, (bits >> 16) + 1
    rest = bits & 0xFFFF
    up = rest > 0x8000 or (rest == 0x8000 and low % 2 == 1)
    return sign | (high if up else low)


def negative(bits, dtype):
    return bool(bits >> (8 * SIZE[dtype] - 1))


def offset_of(axes, lengths, at):
    """The index of an item in an array, by the definition of `axes`."""
    index = 0
    for axis in axes.replace("|", " ").split():
        index = index * lengths[axis] + at[axis]
    return index


class Naive:
    """One prefix in one pool: reads and writes single numbers, by their canonical names."""

    def __init__(self, layout, pool_blocks, blocks, pool):
        self.layout, self.blocks, self.pool = layout, blocks, pool
        shard = layout.shard
        self.first = shard.first if shard else 0
        self.lengths = {
            "layer": layout.layers, "kv": layout.planes, "block": pool_blocks,
            "head": shard.count if shard else layout.kv_heads, "token": layout.block_tokens,
            "dim": layout.head_dim,
        }  # fmt: skip
        numbers = math.prod(self.lengths.values()) * SIZE[layout.dtype]
        self.scales_begin = numbers

    def at(self, layer, plane, token, head, dim=0):
        block, within = divmod(token, self.layout.block_tokens)
        return {
            "layer": layer, "kv": plane, "block": self.blocks[block], "token": within,
            "head": head - self.first, "dim": dim,
        }  # fmt: skip

    def place(self, *where):
        size = SIZE[self.layout.dtype]
        return offset_of(self.layout.axes, self.lengths, self.at(*where)) * size, size

    def scale_place(self, *where):
        scales = self.layout.scales
        size = SIZE[scales.dtype]
        index = offset_of(scales.axes, self.lengths, self.at(*where))
        return self.scales_begin + index * size, size

    def read(self, place):
        begin, size = place
        return int.from_bytes(self.pool[begin : begin + size].tobytes(), "little")

    def write(self, place, bits):
        begin, size = place
        self.pool[begin : begin + size] = np.frombuffer(bits.to_bytes(size, "little"), np.uint8)


def pair_at(layout, there, dim):
    """Which number of a head vector goes to `dim` when the pairing changes to `there`."""
    first, end = layout.rotary or (0, layout.head_dim)
    if layout.rope == there or not first <= dim < end:
        return dim
    half, place = (end - first) // 2, dim - first
    if there == "interleaved":
        return first + (place // 2 if place % 2 == 0 else half + place // 2)
    return first + (2 * place if place < half else 2 * (place - half) + 1)


def group_of(layout, plane, head):
    """What shares a scale with this head vector: the same for all of a group."""
    axes = layout.scales.axes.replace("|", " ").split()
    return (plane if "kv" in axes else 0, head if "head" in axes else 0)


def alike_scales(ours, theirs, heads):
    """Whether codes of one layout are codes of the other, for these heads."""
    if ours.dtype != theirs.dtype or (ours.scales is None) != (theirs.scales is None):
        return False
    if ours.scales is None:
        return True
    groups = [
        [group_of(it, plane, head) for plane in range(it.planes) for head in heads]
        for it in (ours, theirs)
    ]
    partitions = [[[one == other for other in it] for one in it] for it in groups]
    return ours.scales.dtype == theirs.scales.dtype and partitions[0] == partitions[1]


def convert(source, target, tokens, heads):
    """Put a prefix from where `source` has it to where `target` wants it."""
    ours, theirs = source.layout, target.layout
    plain = alike_scales(ours, theirs, heads)
    for layer in range(ours.layers):
        window = theirs.windows[layer] if theirs.windows else 0
        for token in range(max(0, tokens - window) if window else 0, tokens):
            vectors = {}
            for plane in range(ours.planes):
                for head in heads:
                    where = layer, plane, token, head
                    vectors[plane, head] = _vector(source, theirs, where, plain=plain)
            scales = {} if plain else _scales(theirs, vectors)
            for (plane, head), vector in vectors.items():
                where = layer, plane, token, head
                scale = scales.get(group_of(theirs, plane, head)) if scales else None
                for dim, number in enumerate(vector):
                    bits = number if plain else _bits(theirs, number, scale)
                    target.write(target.place(*where, dim), bits)
                if theirs.scales is None:
                    continue
                if plain:
                    bits = source.read(source.scale_place(*where))
                else:
                    bits = to_bits(scale, theirs.scales.dtype, negative=False)
                target.write(target.scale_place(*where), bits)


def _vector(source, theirs, where, *, plain):
    """A head vector as the target pairs it: bits, or (value in float32, sign bit)."""
    ours, plane = source.layout, where[1]
    dims = range(ours.head_dim)
    if plane == 0:
        dims = [pair_at(ours, theirs.rope, dim) for dim in dims]
    bits = [source.read(source.place(*where, dim)) for dim in dims]
    if plain:
        return bits
    with np.errstate(all="ignore"):
        numbers = [np.float32(value(it, ours.dtype)) for it in bits]
        if ours.scales is not None:
            scale = value(source.read(source.scale_place(*where)), ours.scales.dtype)
            numbers = [it * np.float32(scale) for it in numbers]
            signs = [not np.isnan(it) and bool(np.signbit(it)) for it in numbers]
            return list(zip(numbers, signs, strict=True))
    signs = [negative(it, ours.dtype) for it in bits]
    return list(zip(numbers, signs, strict=True))


def _scales(theirs, vectors):
    if theirs.scales is None:
        return {}
    groups = {}
    for (plane, head), vector in vectors.items():
        numbers = [abs(number) for number, _ in vector]
        groups.setdefault(group_of(theirs, plane, head), []).extend(numbers)
    most = np.float32(127 if theirs.dtype == "int8" else 448)
    dtype = theirs.scales.dtype
    scales = {}
    for group, numbers in groups.items():
        if not all(math.isfinite(it) for it in numbers):
            scales[group] = math.nan
            continue
        scale = value(to_bits(float(max(numbers) / most), dtype, negative=False), dtype)
        scales[group] = scale if math.isfinite(scale) else math.nan
    return scales


def _bits(theirs, number, scale):
    number, sign = number
    if scale is None:
        return to_bits(float(number), theirs.dtype, sign)
    if math.isnan(scale) or scale == 0:
        return 0
    with np.errstate(all="ignore"):
        code = float(number / np.float32(scale))
    if theirs.dtype == "int8":
        return int(np.rint(min(max(code, -127), 127))) % 256
    return to_bits(code, theirs.dtype, math.copysign(1, code) < 0)
