"""Where an attention kernel keeps each number of a block, learned by watching it write.

The shape of a registered KV tensor does not say: vLLM's CPU kernels keep K of a block transposed,
and in pairs of rows for the matrix unit, in a tensor that looks as if it were token by token. So
the kernel writes known numbers into one block, once for each coordinate, and the block is read
back. Nothing here knows torch or vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_EXACT = 256
"""Whole numbers up to this are exact in every float dtype, bfloat16 included."""


class Shape(NamedTuple):
    """One block of one layer, as a layout has it: K and V, heads, tokens, numbers of a head."""

    planes: int
    heads: int
    tokens: int
    dims: int

    @property
    def numbers(self) -> int:
        """How many numbers a block has."""
        return math.prod(self)


def coordinate(shape: Shape, axis: str) -> NDArray[np.int64]:
    """For each number of a block, its place along `axis`, as an array of `shape`."""
    index = Shape._fields.index(axis)
    lengths = [1] * len(shape)
    lengths[index] = shape[index]
    return np.broadcast_to(np.arange(shape[index]).reshape(lengths), shape)


def places(shape: Shape, seen: Mapping[str, NDArray[np.float64]]) -> NDArray[np.int64]:
    """Where in the kernel's block each number lies, in the order of `shape`.

    `seen[axis]` is the block, flat, after the kernel wrote every number's place along that axis.

    Raises:
        ValueError: the kernel keeps something else there than each number once, as it was.
    """
    if max(shape) > MOST_EXACT:
        raise ValueError(f"a block of {shape} has an axis longer than {MOST_EXACT}")
    found = np.zeros(shape.numbers, np.int64)
    for axis, length in zip(Shape._fields, shape, strict=True):
        digits = seen[axis]
        if digits.shape != (shape.numbers,):
            raise ValueError(f"a block has {digits.size} numbers, its layout {shape.numbers}")
        wrong = (digits < 0) | (digits >= length) | (digits != np.floor(digits))
        if wrong.any():
            raise ValueError(f"the kernel does not keep numbers as they are (along {axis})")
        found = found * length + digits.astype(np.int64)
    order = np.argsort(found, kind="stable")
    if not np.array_equal(found[order], np.arange(shape.numbers)):
        raise ValueError("the kernel does not keep each number of a block once")
    return order
