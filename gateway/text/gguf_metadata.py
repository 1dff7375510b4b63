"""Read the metadata of a GGUF file, and not one byte of its tensors.

The gateway wants vocabulary and template, a few MiB of a file of many; nothing here maps or
keeps the file. Start with `read_metadata`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gateway.text.errors import ModelUnreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_ITEMS = 1 << 24
STRING, ARRAY = 8, 9
SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
LENGTH = SCALARS[10]
KIND = SCALARS[4]


def read_metadata(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The entries whose key is `wanted`: numbers, strings, lists.

    Raises:
        ModelUnreadable: `path` is no such file.
    """
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return dict(_entries(_Reader(file), wanted))
    except OSError as error:
        raise ModelUnreadable(f"{path}: {error.strerror or error}") from error
    except (ModelUnreadable, UnicodeDecodeError) as error:
        raise ModelUnreadable(f"{path} is not a readable GGUF file: {error}") from error


def _entries(reader: _Reader, wanted: Callable[[str], bool]) -> list[tuple[str, Any]]:
    if reader.take(4) != MAGIC:
        raise ModelUnreadable("it does not begin with GGUF")
    version = reader.number(KIND)
    if version not in VERSIONS:
        raise ModelUnreadable(f"version {version} is none of {VERSIONS}")
    reader.number(LENGTH)  # how many tensors: their table comes after the metadata
    entries = []
    for _ in range(reader.count(MAX_ENTRIES)):
        key = reader.text()
        value = reader.value(reader.number(KIND))
        if wanted(key):
            entries.append((key, value))
    return entries


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise ModelUnreadable("it ends in the middle of its metadata")
        return data

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def count(self, limit: int) -> int:
        count: int = self.number(LENGTH)
        if count > limit:
            raise ModelUnreadable(f"a length of {count} is not believable")
        return count

    def text(self) -> str:
        return self.take(self.count(MAX_STRING_BYTES)).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        if kind not in SCALARS:
            raise ModelUnreadable(f"there is no type {kind}")
        return self.number(SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self.number(KIND), self.count(MAX_ITEMS)
        if kind == STRING:
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise ModelUnreadable(f"an array of type {kind} is not expected")
        form = SCALARS[kind]
        return [item for (item,) in form.iter_unpack(self.take(count * form.size))]
