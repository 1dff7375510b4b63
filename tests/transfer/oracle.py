"""Conversions of numbers in plain numpy: slow, and written apart from the kernels."""

from __future__ import annotations

import sys

import numpy as np

WORD = {2: np.uint16, 4: np.uint32}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CHUNK = 16384


def cast(words, source, target):
    """Numbers of type `source` as numbers of type `target`, both as words; shape is kept."""
    if source == target:
        return words
    flat = words.reshape(-1)
    rounded = np.empty(flat.size, dtype=WORD[ITEM_BYTES[target]])
    for first in range(0, flat.size, CHUNK):
        piece = slice(first, first + CHUNK)
        rounded[piece] = _narrow(_widen(flat[piece], source), target)
    return rounded.reshape(words.shape)


def pair(words, pairing):
    """Permute the last axis from one RoPE pairing to the other."""
    half = words.shape[-1] // 2
    outer = words.shape[:-1]
    split = (2, half) if pairing == "half to interleaved" else (half, 2)
    return words.reshape(*outer, *split).swapaxes(-1, -2).reshape(words.shape)


def _widen(words, source):
    """As words of float32."""
    if source == "float32":
        return words
    if source == "bfloat16":
        return words.astype(np.uint32) << np.uint32(16)
    wide = words.view(np.float16).astype(np.float32).view(np.uint32)
    nan = (words & np.uint16(0x7FFF)) > 0x7C00
    if nan.any():
        sign = words[nan].astype(np.uint32) & np.uint32(0x8000)
        wide[nan] = (sign << np.uint32(16)) | np.uint32(0x7FC00000)
    return wide


def _narrow(wide, target):
    """From words of float32."""
    if target == "float32":
        return wide
    if target == "bfloat16":
        rounded = (wide >> np.uint32(16)) & np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += wide
        narrow = _upper_halves(rounded)
        quiet = 0x7FC0
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            narrow = wide.view(np.float32).astype(np.float16).view(np.uint16)
        quiet = 0x7E00
    nan = np.isnan(wide.view(np.float32))
    if nan.any():
        sign = (wide[nan] >> np.uint32(16)).astype(np.uint16) & np.uint16(0x8000)
        narrow[nan] = sign | np.uint16(quiet)
    return narrow


def _upper_halves(wide):
    upper = 1 if sys.byteorder == "little" else 0
    return np.ascontiguousarray(wide.view(np.uint16).reshape(*wide.shape, 2)[..., upper])
