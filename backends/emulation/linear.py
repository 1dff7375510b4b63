"""Matrix multiplication with weights laid out once for the machine that runs them.

On CPUs oneDNN with prepacked weights is up to four times faster than `F.linear`, which repacks
or takes a slower path; where this build of torch cannot prepack, `F.linear` is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

_PACKED_FOR_ROWS = 8


class Linear:
    """`y = x W^T + b` for `x` of shape [rows, in], with `W` of shape [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        packed = _prepack(weight)
        self.prepacked = packed is not None
        self._weight = weight if packed is None else packed
        if self.prepacked:
            operator = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (it has no public name)
            self._multiply, self._multiply_and_add = operator.default, operator.binary

    def __call__(self, rows: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply, and add `plus`. Allocates the result."""
        product: torch.Tensor
        if not self.prepacked:
            product = functional.linear(rows, self._weight, self._bias)
            return product if plus is None else product.add_(plus)
        if plus is None:
            product = self._multiply(rows, self._weight, self._bias, "none", [], "")
        else:
            product = self._multiply_and_add(rows, plus, self._weight, self._bias, "add")
        return product


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware.

    Without AVX512-BF16 or AMX the same multiplication is emulated, several times slower than
    float32.
    """
    probes: list[Callable[[], bool]] = [
        getattr(torch.cpu, name)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if hasattr(torch.cpu, name)
    ]
    return any(probe() for probe in probes)


def _prepack(weight: torch.Tensor) -> torch.Tensor | None:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    if weight.dtype == torch.bfloat16 and not bfloat16_is_fast():
        return None
    try:
        reorder = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 (as above)
        packed: torch.Tensor = reorder(weight, _PACKED_FOR_ROWS)
    except (AttributeError, RuntimeError):  # another torch, or a build without oneDNN
        return None
    return packed
