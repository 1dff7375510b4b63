"""Read a `.safetensors` file: a length, a JSON header of that length, then the tensors' bytes.

Read here because the library of that name gives bfloat16 to torch only.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.errors import BackendMisconfigured

_MOST_HEADER = 100 << 20
_KINDS: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class _Stored(msgspec.Struct, frozen=True):
    """Where one tensor lies: `data_offsets` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """One file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if path.stat().st_size < 8:
                raise BackendMisconfigured(f"model: cannot read {path}: it has no header")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._path = path
        self._start = 8 + int.from_bytes(self._data[:8], "little")
        if self._start > min(len(self._data), _MOST_HEADER):
            self._refuse("it ends inside its header")
        try:
            header = msgspec.json.decode(self._data[8 : self._start], type=dict[str, Any])
            header.pop("__metadata__", None)
            self._tensors = msgspec.convert(header, dict[str, _Stored])
        except (msgspec.DecodeError, RecursionError) as error:
            self._refuse(f"its header is damaged: {error}")
        for name, stored in self._tensors.items():
            first, end = stored.data_offsets
            if not 0 <= first <= end <= len(self._data) - self._start:
                self._refuse(f"it ends inside tensor {name}")

    def names(self) -> list[str]:
        """The tensors that are there."""
        return list(self._tensors)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one tensor."""
        first, end = self._tensors[name].data_offsets
        return np.frombuffer(self._data, np.uint8, end - first, self._start + first)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor, widened to float32.

        Raises:
            BackendMisconfigured: it has another dtype than float32, float16 or bfloat16.
        """
        stored, raw = self._tensors[name], self.raw(name)
        kind = _KINDS.get(stored.dtype)
        if kind is None:
            raise BackendMisconfigured(f"model: tensor {name} has the dtype {stored.dtype}")
        if (
            min(stored.shape, default=0) < 0
            or len(raw) != math.prod(stored.shape) * np.dtype(kind).itemsize
        ):
            self._refuse(f"tensor {name} has not the bytes of its shape")
        numbers = np.frombuffer(raw.tobytes(), kind).reshape(stored.shape)
        if stored.dtype == "BF16":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32)

    def close(self) -> None:
        """Unmap the file."""
        self._data.close()

    def _refuse(self, why: str) -> None:
        raise BackendMisconfigured(f"model: cannot read {self._path}: {why}")
