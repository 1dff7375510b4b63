"""Rotary position embedding as a checkpoint means it: frequencies, and which dimensions pair.

The formula is RoFormer's (Su et al., 2021); the scaling is Llama 3.1's.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.checkpoint.spec import Llama3Scaling, ModelSpec, Pairing

Number = TypeVar("Number", np.float32, np.uint8)


def inverse_frequencies(spec: ModelSpec) -> NDArray[np.float64]:
    """Radians per position of each pair, `head_dim / 2` of them."""
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    frequencies: NDArray[np.float64] = spec.rope_theta**-exponents
    if spec.rope_scaling is not None:
        frequencies = _stretch(frequencies, spec.rope_scaling)
    return frequencies


def _stretch(frequencies: NDArray[np.float64], scaling: Llama3Scaling) -> NDArray[np.float64]:
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clip(0, 1)
    stretched: NDArray[np.float64] = frequencies * keep + frequencies / scaling.factor * (1 - keep)
    return stretched


def repaired(
    weight: NDArray[Number], heads: int, source: Pairing, target: Pairing
) -> NDArray[Number]:
    """Reorder the rows of a Q or K projection (or norm) so that pairs lie as `target` says."""
    if source == target:
        return weight
    pairs = weight.reshape(heads, *((2, -1) if source == "half" else (-1, 2)), *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
