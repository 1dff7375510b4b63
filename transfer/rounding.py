"""Round numbers from one dtype to another and permute RoPE pairs, on unsigned words.

`bfloat16`, which numpy lacks, is handled as the upper half of a float32. Rounding is to nearest,
ties to even. Every NaN comes out as the one quiet NaN of its sign wherever hardware and software
would disagree about its payload, so that two machines round alike to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.layout import DType
from transfer.plan import Pairing

Words = NDArray[Any]


def cast(words: Words, source: DType, target: DType) -> Words:
    """Numbers of type `source` as numbers of type `target`, both as words; shape is kept."""
    if source == target:
        return words
    return _narrow(_widen(words, source), target)


def pair(words: Words, pairing: Pairing) -> Words:
    """Permute the last axis from one RoPE pairing to the other."""
    half = words.shape[-1] // 2
    outer = words.shape[:-1]
    split = (2, half) if pairing == "half to interleaved" else (half, 2)
    return words.reshape(*outer, *split).swapaxes(-1, -2).reshape(words.shape)


def _widen(words: Words, source: DType) -> Words:
    """As words of float32."""
    if source == "float32":
        return words
    if source == "bfloat16":
        return words.astype(np.uint32) << np.uint32(16)
    wide: Words = words.view(np.float16).astype(np.float32).view(np.uint32)
    nan = (words & np.uint16(0x7FFF)) > 0x7C00
    if nan.any():
        sign = words[nan].astype(np.uint32) & np.uint32(0x8000)
        wide[nan] = (sign << np.uint32(16)) | np.uint32(0x7FC00000)
    return wide


def _narrow(wide: Words, target: DType) -> Words:
    """From words of float32."""
    if target == "float32":
        return wide
    if target == "bfloat16":
        rounded = (wide >> np.uint32(16)) & np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += wide
        rounded >>= np.uint32(16)
        narrow: Words = rounded.astype(np.uint16)
        quiet = 0x7FC0
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            narrow = wide.view(np.float32).astype(np.float16).view(np.uint16)
        quiet = 0x7E00
    nan = (wide & np.uint32(0x7FFFFFFF)) > 0x7F800000
    if nan.any():
        sign = (wide[nan] >> np.uint32(16)).astype(np.uint16) & np.uint16(0x8000)
        narrow[nan] = sign | np.uint16(quiet)
    return narrow
