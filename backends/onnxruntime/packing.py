"""Weights as the graph multiplies with them: float32, or blocks of a GGUF file as they are.

A block of 32 numbers of kind Q4_0 is `d (q - 8)`, of Q8_0 `d q`, of Q4_1 `d q + m`. The operator
`MatMulNBits` knows `d (q - 8)` for 4 bits and `d (q - 128)` for 8; the rest of Q4_1, `m + 8 d`, is
multiplied with the sums of the activations over each block. Nothing is rounded anew.
"""

from __future__ import annotations

from typing import Any, TypeVar

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.checkpoint.rope import repaired
from backends.checkpoint.spec import Checkpoint, ModelSpec, Pairing, expected_tensors
from backends.errors import BackendMisconfigured

BLOCK = 32
Kind = gguf.GGMLQuantizationType
PACKED = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
FOUR_BITS = (Kind.Q4_0, Kind.Q4_1)

Array = NDArray[Any]
Number = TypeVar("Number", np.float32, np.uint8)


class Packed(msgspec.Struct, frozen=True):
    """A matrix in blocks of 32: `codes` [out, block, bytes], `scales` [out, block].

    `rest` [out, block] is what each block's sum of activations is multiplied with.
    """

    bits: int
    codes: Array
    scales: Array
    rest: Array | None = None


Matrix = Packed | Array
"""[out, in]: in blocks, or float32."""


def is_four_bit(checkpoint: Checkpoint) -> bool:
    """Whether the matrices of the layers are a GGUF file's blocks of four bits."""
    if not isinstance(checkpoint, GGUFCheckpoint):
        return False
    kinds = {checkpoint.form(name)[0] for name in _matrices(checkpoint.spec) if "blk." in name}
    return kinds <= {*PACKED} and not kinds.isdisjoint(FOUR_BITS)


def _matrices(spec: ModelSpec) -> list[str]:
    return [name for name, shape in expected_tensors(spec) if len(shape) == 2]


class Weights:
    """Reads a checkpoint tensor by tensor, in one precision and RoPE pairing."""

    def __init__(self, checkpoint: Checkpoint, pairing: Pairing, *, packed: bool) -> None:
        self.spec = checkpoint.spec
        self._checkpoint = checkpoint
        self._pairing = pairing
        self._packed = packed
        self._shapes = dict(expected_tensors(checkpoint.spec))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weights, or a bias."""
        return self._paired(name, self._exact(name))

    def table(self, name: str) -> NDArray[np.float32]:
        """A matrix in float32, whatever the precision."""
        return self._paired(name, self._exact(name))

    def matrix(self, name: str) -> Matrix:
        """A matrix in the form that it is multiplied in.

        Raises:
            BackendMisconfigured: it has another shape, or is in no form that can be carried.
        """
        if not self._packed:
            return self.table(name)
        assert isinstance(self._checkpoint, GGUFCheckpoint)
        kind, shape = self._checkpoint.form(name)
        if kind not in PACKED:
            raise BackendMisconfigured(
                f"weights: tensor {name} is {kind.name}; q4 carries Q4_0, Q4_1 and Q8_0"
            )
        if shape != self._shapes[name]:
            self._refuse(name, shape)
        _, rows = self._checkpoint.stored(name)
        blocks = self._paired(name, rows.reshape(shape[0], shape[1] // BLOCK, -1))
        return _unpack(kind, blocks)

    def fused(self, names: list[str]) -> list[Matrix]:
        """Several matrices, stacked where they have one form."""
        found = [self.matrix(name) for name in names]
        if all(isinstance(it, np.ndarray) for it in found):
            return [np.concatenate(found)]  # type: ignore[arg-type]
        packed = [it for it in found if isinstance(it, Packed)]
        forms = {(it.bits, it.rest is None) for it in packed}
        if len(packed) < len(found) or len(forms) > 1:
            return found
        rests = [it.rest for it in packed if it.rest is not None]
        return [
            Packed(
                packed[0].bits,
                np.concatenate([it.codes for it in packed]),
                np.concatenate([it.scales for it in packed]),
                np.concatenate(rests) if rests else None,
            )
        ]

    def _exact(self, name: str) -> NDArray[np.float32]:
        tensor = self._checkpoint.tensor(name)
        if tensor.shape != self._shapes[name]:
            self._refuse(name, tensor.shape)
        return tensor

    def _refuse(self, name: str, shape: tuple[int, ...]) -> None:
        raise BackendMisconfigured(
            f"model: tensor {name} has shape {shape}, not {self._shapes[name]}"
        )

    def _paired(self, name: str, rows: NDArray[Number]) -> NDArray[Number]:
        kind = name.split(".")[-2]
        heads = {"attn_q": self.spec.heads, "attn_k": self.spec.kv_heads}.get(kind, 1)
        if kind in ("attn_q", "attn_k", "attn_q_norm", "attn_k_norm"):
            return repaired(rows, heads, self.spec.pairing, self._pairing)
        return rows


def _unpack(kind: Kind, blocks: NDArray[np.uint8]) -> Packed:
    halves = np.ascontiguousarray(blocks[..., : 4 if kind == Kind.Q4_1 else 2]).view(np.float16)
    scales = halves[..., 0].astype(np.float32)
    if kind == Kind.Q8_0:
        return Packed(8, blocks[..., 2:] ^ np.uint8(0x80), scales)
    rest = halves[..., 1].astype(np.float32) + 8 * scales if kind == Kind.Q4_1 else None
    return Packed(4, _interleaved(blocks[..., -BLOCK // 2 :]), scales, rest)


def _interleaved(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nibbles of neighbours in one byte, where GGUF has number `i` and `i + 16` in one."""
    low, high = codes & 0xF, codes >> 4
    ordered = np.concatenate([low, high], -1)
    packed: NDArray[np.uint8] = ordered[..., ::2] | (ordered[..., 1::2] << 4)
    return packed
