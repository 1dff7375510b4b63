"""The compiled rounding agrees with the nearest number, found in plain Python, to the bit."""

import numpy as np
import pytest
from naive import QUIET, SIZE, negative, to_bits, value

from transfer import rounding
from transfer.rounding import KIND

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
NARROW = ("float16", "bfloat16", "float8_e4m3")


def cast(words, source, target):
    words = np.ascontiguousarray(words, WORDS[SIZE[source]])
    wide = np.empty(len(words), np.uint32)
    rounding.widen(KIND[source], words.ctypes.data, wide.ctypes.data, len(words))
    cut = np.empty(len(words), WORDS[SIZE[target]])
    rounding.narrow(KIND[target], wide.ctypes.data, cut.ctypes.data, len(words))
    return cut


def near_the_borders(dtype):
    """Words of float32 on, just below and just above every border between two numbers."""
    bits = range(0, 1 << (8 * SIZE[dtype] - 1), 1 if dtype == "float8_e4m3" else 37)
    numbers = np.array([value(it, dtype) for it in bits])
    numbers = numbers[np.isfinite(numbers)]
    halves = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32).view(np.uint32)
    return np.concatenate([halves - 1, halves, halves + 1, numbers.astype(np.float32).view("u4")])


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_are_rounded_to_the_nearest_ties_to_even(dtype):
    random = np.random.default_rng(1).integers(0, 1 << 32, 2000, dtype=np.uint64)
    words = np.concatenate([near_the_borders(dtype), random.astype(np.uint32)])
    words = np.concatenate([words, words | 0x80000000]).astype(np.uint32)
    wanted = [
        to_bits(value(it, "float32"), dtype, negative(it, "float32")) for it in words.tolist()
    ]
    assert cast(words, "float32", dtype).tolist() == wanted


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
    assert cast(list(cases), "float32", "bfloat16").tolist() == list(cases.values())


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_survives_widening(dtype):
    every = np.arange(1 << 8 * SIZE[dtype]).astype(WORDS[SIZE[dtype]])
    back = cast(every, dtype, dtype)
    nan = np.array([np.isnan(value(it, dtype)) for it in every.tolist()])
    assert (back[~nan] == every[~nan]).all()
    sign = 1 << (8 * SIZE[dtype] - 1)
    assert (back[nan] == ((every[nan] & sign) | QUIET[dtype])).all()


def test_float16_overflows_to_infinity_and_float8_saturates():
    numbers = np.array([65504, 65520, -1e9, 2049, 2051, 1e-9], np.float32)
    halves = cast(numbers.view(np.uint32), "float32", "float16").view(np.float16)
    assert halves.tolist() == [65504.0, np.inf, -np.inf, 2048.0, 2052.0, 0.0]
    numbers = np.array([448, 449, -1e9, np.inf, 464, 465], np.float32)
    eighths = cast(numbers.view(np.uint32), "float32", "float8_e4m3")
    assert eighths.tolist() == [0x7E, 0x7E, 0xFE, 0x7E, 0x7E, 0x7E]


def test_bytes_widen_with_their_sign():
    codes = np.arange(256).astype(np.uint8)
    wide = np.empty(256, np.float32)
    rounding.widen(KIND["int8"], codes.ctypes.data, wide.ctypes.data, 256)
    assert wide.tolist() == codes.view(np.int8).tolist()


@pytest.mark.parametrize("word", WORDS.values())
def test_pairing_there_and_back_is_where_we_began(word):
    words = np.arange(6, dtype=word)
    there, back = np.empty_like(words), np.empty_like(words)
    size = words.itemsize
    rounding.pair(rounding.TO_INTERLEAVED, size, words.ctypes.data, there.ctypes.data, 6)
    rounding.pair(rounding.TO_HALF, size, there.ctypes.data, back.ctypes.data, 6)
    assert there.tolist() == [0, 3, 1, 4, 2, 5]
    assert (back == words).all()
