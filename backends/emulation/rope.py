"""Rotary position embedding, for weights that pair dimensions by halves or interleaved.

The formula is RoFormer's (Su et al., 2021); the scaling is Llama 3.1's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from backends.emulation.spec import Llama3Scaling, ModelSpec, Pairing


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Radians per position of each pair, float64, `head_dim / 2` of them."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    frequencies = spec.rope_theta**-exponents
    if spec.rope_scaling is not None:
        frequencies = _stretch(frequencies, spec.rope_scaling)
    return frequencies


def _stretch(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def repaired(weight: torch.Tensor, heads: int, source: Pairing, target: Pairing) -> torch.Tensor:
    """Reorder the rows of a Q or K projection (or norm) so that pairs lie as `target` says."""
    if source == target:
        return weight
    pairs = weight.view(heads, *((2, -1) if source == "half" else (-1, 2)), *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


class Rope:
    """Turns Q and K in place. Angles are computed once in float64 and kept as float32."""

    def __init__(self, spec: ModelSpec, context: int, pairing: Pairing, device: str) -> None:
        self._pairing = pairing
        positions = torch.arange(context, dtype=torch.float64)
        angles = torch.outer(positions, inverse_frequencies(spec))
        cosine, sine = angles.cos().float(), angles.sin().float()
        if pairing == "interleaved":
            table = torch.complex(cosine, sine)
        else:
            # cos twice, then -sin and sin: what a half turned by `roll` is multiplied with
            table = torch.cat([cosine, cosine, -sine, sine], dim=-1)
        self._table = table.to(device)

    def turning(self, heads: torch.Tensor, positions: torch.Tensor) -> Callable[[], None]:
        """What turns whatever is in `heads`, float32 [head, token, dim], in place, when called."""
        table = self._table[positions]
        if self._pairing == "interleaved":
            pairs = torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2))
            return lambda: _multiply(pairs, table)
        return lambda: _turn_halves(heads, *table.chunk(2, dim=-1))


def _multiply(pairs: torch.Tensor, table: torch.Tensor) -> None:
    pairs.mul_(table)


def _turn_halves(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cosine).addcmul_(swapped, sine)
