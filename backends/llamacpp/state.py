"""The state of one sequence as llama.cpp writes and reads it: numpy views of its bytes. Pure.

Little endian, one stream:

    u32 magic, i32 sequence, u32 streams = 1, u32 cells
    per cell: i32 position, u32 sequences = 1, i32 sequence
    u32 whether V is transposed, u32 layers
    K of each layer: i32 type, u64 bytes of a row, then a row of numbers for each cell
    V of each layer: the same; or, transposed, i32 type, u32 bytes of a number, u32 numbers in a
    row, then for each of these numbers that of every cell

There are neither tokens nor logits in it, nor a version: `check_probe` compares a state of one
token, written by the library that is there, with what this module would build.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.errors import BackendMisconfigured, StepFailed
from transfer.layout import ITEM_BYTES, DType

Bytes = NDArray[np.uint8]
Numbers = NDArray[Any]
"""Raw numbers: unsigned integers of their size."""

MAGIC = 0xAF143CD8
TYPES: dict[DType, int] = {"float32": 0, "float16": 1}
"""How ggml numbers the types that a pool has too."""

_HEAD = np.dtype([("magic", "<u4"), ("sequence", "<i4"), ("streams", "<u4"), ("cells", "<u4")])
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])
_MIDDLE = np.dtype([("transposed", "<u4"), ("layers", "<u4")])
_ROWS = np.dtype([("type", "<i4"), ("row_bytes", "<u8")])
_COLUMNS = np.dtype([("type", "<i4"), ("number_bytes", "<u4"), ("numbers", "<u4")])
_PLANE_BYTES = _ROWS.itemsize


class Form(msgspec.Struct, frozen=True):
    """What all states of one context have in common: `numbers` are a token's K, or V, of a layer.

    V is transposed where attention is not computed by flash attention.
    """

    layers: int
    numbers: int
    dtype: DType
    transposed: bool

    @property
    def item(self) -> np.dtype[Any]:
        """A raw number."""
        return np.dtype(f"<u{ITEM_BYTES[self.dtype]}")

    def nbytes(self, cells: int) -> int:
        """Bytes of a state of so many cells."""
        plane = _PLANE_BYTES + cells * self.numbers * self.item.itemsize
        head = _HEAD.itemsize + cells * _CELL.itemsize + _MIDDLE.itemsize
        return head + 2 * self.layers * plane

    def plane_heads(self) -> Bytes:
        """What stands before the numbers of each plane: [K|V, layer, byte]."""
        kind, size = TYPES[self.dtype], self.item.itemsize
        heads = np.empty((2, self.layers, _PLANE_BYTES), np.uint8)
        heads[:] = np.array([(kind, self.numbers * size)], _ROWS).view(np.uint8)
        if self.transposed:
            heads[1] = np.array([(kind, size, self.numbers)], _COLUMNS).view(np.uint8)
        return heads


class State:
    """A state of `cells` cells in memory of its own, `raw`.

    `keys` and `values` are views of its numbers: [layer, cell, number].
    """

    def __init__(self, form: Form, cells: int) -> None:
        self._form = form
        self.cells = cells
        self.raw: Bytes = np.zeros(form.nbytes(cells), np.uint8)
        middle = _HEAD.itemsize + cells * _CELL.itemsize
        planes = middle + _MIDDLE.itemsize
        self._head = self.raw[: _HEAD.itemsize].view(_HEAD)
        self._cells = self.raw[_HEAD.itemsize : middle].view(_CELL)
        self._middle = self.raw[middle:planes].view(_MIDDLE)
        by_plane = self.raw[planes:].reshape(2, form.layers, -1)
        self._plane_heads = by_plane[:, :, :_PLANE_BYTES]
        keys, values = by_plane[:, :, _PLANE_BYTES:].view(form.item)
        self.keys: Numbers = keys.reshape(form.layers, cells, form.numbers)
        self.values: Numbers = values.reshape(self.keys.shape)
        if form.transposed:
            self.values = values.reshape(form.layers, form.numbers, cells).swapaxes(1, 2)

    def begin(self, first: int) -> None:
        """Be the state of positions from `first` on, whose numbers are to be filled in."""
        self._head[0] = (MAGIC, 0, 1, self.cells)
        self._cells["position"] = np.arange(first, first + self.cells)
        self._cells["sequences"] = 1
        self._cells["sequence"] = 0
        self._middle[0] = (self._form.transposed, self._form.layers)
        self._plane_heads[...] = self._form.plane_heads()

    def check(self, first: int) -> None:
        """Refuse what the library wrote here unless it holds each position from `first` on once.

        Afterwards the cells are in the order of positions: they were where there was room.

        Raises:
            StepFailed: says what was seen.
        """
        if strange := self._strange():
            raise StepFailed(f"llama.cpp wrote a state that is not understood: {strange}")
        wanted = np.arange(first, first + self.cells)
        positions = self._cells["position"]
        if np.array_equal(positions, wanted):
            return
        order = np.argsort(positions, kind="stable")
        if not np.array_equal(positions[order], wanted):
            raise StepFailed(
                f"llama.cpp holds positions {positions.min()} to {positions.max()} in"
                f" {self.cells} cells, not {first} to {first + self.cells - 1}"
            )
        for numbers in (self.keys, self.values):
            numbers[...] = numbers[:, order]

    def _strange(self) -> str:
        """What differs from the form at the top; empty when nothing does."""
        head, middle, seen = self._head[0], self._middle[0], []
        for name, found, known in (
            ("magic", hex(head["magic"]), hex(MAGIC)),
            ("streams", int(head["streams"]), 1),
            ("cells", int(head["cells"]), self.cells),
            ("V transposed", int(middle["transposed"]), int(self._form.transposed)),
            ("layers", int(middle["layers"]), self._form.layers),
        ):
            if found != known:
                seen.append(f"{name} {found} instead of {known}")
        if not (self._cells["sequences"] == 1).all():
            seen.append("cells of several sequences")
        known_heads = self._form.plane_heads()
        for plane, layer in np.argwhere((self._plane_heads != known_heads).any(-1))[:1]:
            found_head, known_head = self._plane_heads[plane, layer], known_heads[plane, layer]
            seen.append(
                f"{'KV'[plane]} of layer {layer} beginning with {found_head.tobytes().hex(' ', 4)}"
                f" instead of {known_head.tobytes().hex(' ', 4)}"
            )
        return ", ".join(seen)


def check_probe(form: Form, written: bytes) -> None:
    """Compare a state of one token at position 0, as the library wrote it, with `form`.

    Raises:
        BackendMisconfigured: this version writes something else; says what.
    """
    if len(written) != form.nbytes(1):
        seen = written[: _HEAD.itemsize + _CELL.itemsize + _MIDDLE.itemsize].hex(" ", 4)
        raise BackendMisconfigured(
            f"llama.cpp's state of one token has {len(written)} bytes where {form.nbytes(1)} were"
            f" expected, and begins with {seen}: this version is not known"
        )
    state = State(form, 1)
    state.raw[:] = np.frombuffer(written, np.uint8)
    try:
        state.check(0)
    except StepFailed as error:
        raise BackendMisconfigured(f"{error}: this version is not known") from None
