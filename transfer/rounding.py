"""Numbers of one dtype as those of another, and RoPE pairs in another order: compiled.

Everything goes through float32. Rounding is to nearest, ties to even. A number too large for
float16 or bfloat16 becomes infinite, one too large for float8_e4m3 the largest. Every NaN comes out
as the one quiet NaN of its sign, so that two machines round alike to the bit, whatever their
hardware does with a NaN's payload.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from transfer.layout import DType
from transfer.raw import (
    as_bits,
    as_float,
    compiled,
    copy,
    inlined,
    load8,
    load16,
    load32,
    store8,
    store16,
    store32,
)

KIND: dict[DType, int] = {
    "float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3": 3, "int8": 4,
}  # fmt: skip
"""How the kernels call a dtype."""

FLOAT32, FLOAT16, BFLOAT16, FLOAT8, INT8 = KIND.values()

SAME, TO_INTERLEAVED, TO_HALF = 0, 1, 2
"""How the kernels call what is done to the pairs of K."""

U32 = np.uint32
MAGNITUDE = U32(0x7FFFFFFF)
QUIET = U32(0x7FC00000)
INFINITE = U32(0x7F800000)
LARGEST_EIGHTH = U32(0x43E00000)  # 448
LARGEST_CODE = np.float32(127)
ROUNDER = np.float32(12582912)  # 1.5 * 2**23: what is added to it is rounded to a whole number


@inlined
def _half_to_float(half: Any) -> Any:
    sign = U32(U32(half & U32(0x8000)) << U32(16))
    shifted = U32(U32(half & U32(0x7FFF)) << U32(13))
    # Moves the exponent's bias from 15 to 127, subnormal numbers included.
    bits = as_bits(as_float(shifted) * as_float(U32(0x77800000)))
    if U32(half & U32(0x7C00)) == U32(0x7C00):
        bits = INFINITE if U32(half & U32(0x3FF)) == 0 else QUIET
    return U32(bits | sign)


@inlined
def _float_to_half(bits: Any) -> Any:
    """After F. Giesen's float_to_half_fast3_rtne."""
    sign = U32(U32(bits >> U32(16)) & U32(0x8000))
    size = U32(bits & MAGNITUDE)
    odd = U32(U32(size >> U32(13)) & U32(1))
    narrow = U32(U32(size + U32(0xC8000FFF) + odd) >> U32(13))
    if size < U32(113 << 23):  # subnormal: the adder rounds
        magic = U32(126 << 23)
        narrow = U32(as_bits(as_float(size) + as_float(magic)) - magic)
    if size >= U32(143 << 23):
        narrow = U32(0x7E00) if size > INFINITE else U32(0x7C00)
    return U32(narrow | sign)


@inlined
def _float_to_brain(bits: Any) -> Any:
    odd = U32(U32(bits >> U32(16)) & U32(1))
    narrow = U32(U32(bits + U32(0x7FFF) + odd) >> U32(16))
    if U32(bits & MAGNITUDE) > INFINITE:
        narrow = U32(U32(U32(bits >> U32(16)) & U32(0x8000)) | U32(0x7FC0))
    return narrow


@inlined
def _eighth_to_float(eighth: Any) -> Any:
    sign = U32(U32(eighth & U32(0x80)) << U32(24))
    size = U32(eighth & U32(0x7F))
    # Moves the exponent's bias from 7 to 127, subnormal numbers included.
    bits = as_bits(as_float(U32(size << U32(20))) * as_float(U32(0x7B800000)))
    if size == U32(0x7F):
        bits = QUIET
    return U32(bits | sign)


@inlined
def _float_to_eighth(bits: Any) -> Any:
    sign = U32(U32(bits >> U32(24)) & U32(0x80))
    size = U32(bits & MAGNITUDE)
    odd = U32(U32(size >> U32(20)) & U32(1))
    narrow = U32(U32(size + U32(0xC407FFFF) + odd) >> U32(20))
    if size < U32(121 << 23):  # subnormal: the adder rounds
        magic = U32(141 << 23)
        narrow = U32(as_bits(as_float(size) + as_float(magic)) - magic)
    if size > LARGEST_EIGHTH:
        narrow = U32(0x7F) if size > INFINITE else U32(0x7E)
    return U32(narrow | sign)


@inlined
def item_bytes(kind: int) -> int:
    """Bytes of one number of a kind."""
    return 4 if kind == FLOAT32 else 1 if kind >= FLOAT8 else 2


@compiled
def widen(kind: int, source: int, target: int, count: int) -> None:
    """Turn `count` numbers of a kind at address `source` into float32 at `target`."""
    if kind == FLOAT16:
        for i in range(count):
            store32(target, i, _half_to_float(U32(load16(source, i))))
    elif kind == BFLOAT16:
        for i in range(count):
            store32(target, i, U32(U32(load16(source, i)) << U32(16)))
    elif kind == FLOAT8:
        for i in range(count):
            store32(target, i, _eighth_to_float(U32(load8(source, i))))
    elif kind == INT8:
        for i in range(count):
            store32(target, i, as_bits(np.float32(np.int8(load8(source, i)))))
    else:
        copy(target, source, count * 4)


@compiled
def narrow(kind: int, source: int, target: int, count: int) -> None:
    """Round `count` numbers of float32 at address `source` to a kind at `target`."""
    if kind == FLOAT16:
        for i in range(count):
            store16(target, i, np.uint16(_float_to_half(load32(source, i))))
    elif kind == BFLOAT16:
        for i in range(count):
            store16(target, i, np.uint16(_float_to_brain(load32(source, i))))
    elif kind == FLOAT8:
        for i in range(count):
            store8(target, i, np.uint8(_float_to_eighth(load32(source, i))))
    else:
        copy(target, source, count * 4)


@compiled
def scale_up(numbers: int, count: int, scale: Any) -> None:
    """Multiply `count` numbers of float32 at address `numbers`. A NaN comes out without a sign."""
    for i in range(count):
        bits = as_bits(as_float(load32(numbers, i)) * scale)
        store32(numbers, i, QUIET if U32(bits & MAGNITUDE) > INFINITE else bits)


@compiled
def encode(kind: int, source: int, target: int, count: int, scale: Any) -> None:
    """Turn `count` numbers of float32 into codes of a kind, as `layout.Scales` says."""
    if not scale > 0:  # zero, or NaN
        for i in range(count):
            store8(target, i, np.uint8(0))
    elif kind == INT8:
        for i in range(count):
            code = as_float(load32(source, i)) / scale
            code = min(max(code, -LARGEST_CODE), LARGEST_CODE)
            store8(target, i, np.uint8(np.int32((code + ROUNDER) - ROUNDER)))
    else:
        for i in range(count):
            code = as_float(load32(source, i)) / scale
            store8(target, i, np.uint8(_float_to_eighth(as_bits(code))))


@compiled
def largest(numbers: int, count: int) -> Any:
    """The bits of the largest magnitude among numbers of float32; of a NaN, if there is one."""
    most = U32(0)
    for i in range(count):
        most = max(most, U32(load32(numbers, i) & MAGNITUDE))
    return most


@compiled
def settle(scales: int, count: int, kind: int, scale_kind: int, room: int) -> None:
    """Turn `count` largest magnitudes at `scales` into scales for codes of a kind, in place.

    They stay float32, rounded as `scale_kind` will be; `room` is the address of 4 free bytes.
    """
    most = LARGEST_CODE if kind == INT8 else as_float(LARGEST_EIGHTH)
    for i in range(count):
        bits = as_bits(as_float(load32(scales, i)) / most)
        store32(scales, i, bits)
        narrow(scale_kind, scales + 4 * i, room, 1)
        widen(scale_kind, room, scales + 4 * i, 1)
        if not load32(scales, i) < INFINITE:
            store32(scales, i, QUIET)


@compiled
def pair(how: int, item_bytes: int, source: int, target: int, count: int) -> None:
    """Put the `count` numbers of one head vector into the order of the other RoPE pairing."""
    half = count // 2
    if how == TO_INTERLEAVED:
        if item_bytes == 4:
            for i in range(half):
                store32(target, 2 * i, load32(source, i))
                store32(target, 2 * i + 1, load32(source, half + i))
        elif item_bytes == 2:
            for i in range(half):
                store16(target, 2 * i, load16(source, i))
                store16(target, 2 * i + 1, load16(source, half + i))
        else:
            for i in range(half):
                store8(target, 2 * i, load8(source, i))
                store8(target, 2 * i + 1, load8(source, half + i))
    elif item_bytes == 4:
        for i in range(half):
            store32(target, i, load32(source, 2 * i))
            store32(target, half + i, load32(source, 2 * i + 1))
    elif item_bytes == 2:
        for i in range(half):
            store16(target, i, load16(source, 2 * i))
            store16(target, half + i, load16(source, 2 * i + 1))
    else:
        for i in range(half):
            store8(target, i, load8(source, 2 * i))
            store8(target, half + i, load8(source, 2 * i + 1))
