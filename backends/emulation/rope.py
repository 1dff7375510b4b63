"""Rotary position embedding, for weights that pair dimensions by halves or interleaved."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backends.checkpoint.rope import inverse_frequencies
from backends.checkpoint.spec import ModelSpec, Pairing


class Rope:
    """Turns Q and K in place. Angles are computed once in float64 and kept as float32."""

    def __init__(self, spec: ModelSpec, context: int, pairing: Pairing, device: str) -> None:
        self._pairing = pairing
        positions = torch.arange(context, dtype=torch.float64)
        angles = torch.outer(positions, torch.from_numpy(inverse_frequencies(spec)))
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
