"""Open a GGUF file: its metadata, its identity, and its tensors dequantised one at a time.

The header is read here because the `gguf` package's reader builds an array per vocabulary
entry, which takes seconds; dequantising is left to that package. Nothing in the file is
trusted: every length is checked against what is left of the file before it is used.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from backends.checkpoint.spec import FAMILIES, ModelSpec, Pairing, check_names
from backends.errors import BackendMisconfigured

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}
_STRING, _ARRAY = 8, 9
_KEPT_ARRAY = 64
_SAMPLE = 4096


class Array(msgspec.Struct, frozen=True):
    """A metadata array: how long it is, and its values where they are few."""

    length: int
    values: tuple[Any, ...]


class Stored(msgspec.Struct, frozen=True):
    """Where one tensor lies in the file. `shape` is row-major, as numpy has it."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    bytes: int


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise BackendMisconfigured("model: the GGUF file ends inside its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise BackendMisconfigured(f"model: unknown GGUF metadata type {kind}")
        return self.array()

    def array(self) -> Array:
        kind, length = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            form = f"<{min(length, _KEPT_ARRAY)}{_SCALARS[kind]}"
            raw = self.take(length * struct.calcsize("<" + _SCALARS[kind]))
            return Array(length, struct.unpack_from(form, raw))
        if kind != _STRING:
            raise BackendMisconfigured(f"model: unknown GGUF array type {kind}")
        for _ in range(length):
            self.take(self.number("Q"))
        return Array(length, ())


class GGUFCheckpoint:
    """One GGUF file, mapped into memory. Q and K rows of Llama models are kept as stored."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BackendMisconfigured(f"model: {path} is not a GGUF file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._data)
        cursor.take(4)
        self._metadata, self._tensors, self._pairs = _read_header(cursor)
        self.alignment = max(1, _number(self._metadata, "general.alignment", 32))
        self._start = -(-cursor.at // self.alignment) * self.alignment
        self._check_extent()
        self.spec = _spec(self._metadata, self._tensors)
        self.spec.check()
        check_names(self.spec, self.names())
        self.identity = self._identify(cursor.at)

    def names(self) -> frozenset[str]:
        """The tensors that are there."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, row-major."""
        return self._tensors[name].shape

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32."""
        kind, shape = self.form(name)
        rows = self._rows(name)
        if kind == gguf.GGMLQuantizationType.F32:
            values = rows.view(np.float32)
        elif kind == gguf.GGMLQuantizationType.F16:
            values = rows.view(np.float16)
        else:
            values = gguf.quants.dequantize(rows, kind)
        return np.array(values.reshape(shape), np.float32)

    def form(self, name: str) -> tuple[gguf.GGMLQuantizationType, tuple[int, ...]]:
        """The kind of one tensor's blocks, and the tensor's shape."""
        stored = self._tensors[name]
        return gguf.GGMLQuantizationType(stored.kind), stored.shape

    def stored(self, name: str) -> tuple[gguf.GGMLQuantizationType, NDArray[np.uint8]]:
        """One tensor as it is in the file: the kind of its blocks, and their bytes row by row."""
        return self.form(name)[0], np.array(self._rows(name))

    def _rows(self, name: str) -> NDArray[np.uint8]:
        stored = self._tensors[name]
        raw = np.frombuffer(
            self._data, np.uint8, count=stored.bytes, offset=self._start + stored.offset
        )
        return raw.reshape(*stored.shape[:-1], -1)

    @property
    def metadata(self) -> tuple[int, bytes]:
        """How many pairs of metadata there are, and all of them as they are in the file."""
        return len(self._metadata), self._data[self._pairs]

    def close(self) -> None:
        """Unmap the file."""
        self._data.close()

    def _check_extent(self) -> None:
        for name, stored in self._tensors.items():
            if self._start + stored.offset + stored.bytes > len(self._data):
                raise BackendMisconfigured(f"model: the GGUF file ends inside tensor {name}")

    def _identify(self, header_bytes: int) -> str:
        """Hash all metadata (vocabulary included) and a sample of each tensor's bytes."""
        digest = hashlib.sha256(self._data[:header_bytes])
        digest.update(len(self._data).to_bytes(8, "little"))
        for name in sorted(self._tensors):
            stored = self._tensors[name]
            first = self._start + stored.offset
            for part in (0, (stored.bytes - _SAMPLE) // 2, stored.bytes - _SAMPLE):
                at = first + max(part, 0)
                digest.update(self._data[at : min(at + _SAMPLE, first + stored.bytes)])
        return f"{self.spec.family}-{self.spec.layers}x{self.spec.hidden}-{digest.hexdigest()[:32]}"


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Stored], slice]:
    """Metadata, tensors, and where in the file the metadata is."""
    version = cursor.number("I")
    if version not in (2, 3):
        raise BackendMisconfigured(f"model: GGUF version {version} is unknown, 2 and 3 are read")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    first, metadata = cursor.at, {}
    for _ in range(pairs):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    if len(metadata) != pairs:
        raise BackendMisconfigured("model: a key of the GGUF metadata comes twice")
    place = slice(first, cursor.at)
    return metadata, dict(_read_tensor(cursor) for _ in range(tensors)), place


def _read_tensor(cursor: _Cursor) -> tuple[str, Stored]:
    name = cursor.text()
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise BackendMisconfigured(f"model: tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise BackendMisconfigured(f"model: tensor {name} has the unknown type {kind}") from None
    if shape[-1] % block:
        raise BackendMisconfigured(f"model: rows of tensor {name} are not whole blocks of {block}")
    return name, Stored(shape, kind, offset, math.prod(shape) // block * block_bytes)


def _spec(metadata: dict[str, Any], tensors: dict[str, Stored]) -> ModelSpec:
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise BackendMisconfigured(
            f"model: general.architecture is {family!r}; known are {', '.join(FAMILIES)}"
        )
    _refuse_scaling(metadata, family, tensors)

    def field(name: str, default: Any = None) -> Any:
        return _number(metadata, f"{family}.{name}", default)

    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", hidden // max(1, heads))
    if field("rope.dimension_count", head_dim) != head_dim:
        raise BackendMisconfigured(f"model: {family}.rope.dimension_count must be {head_dim}")
    pairing: Pairing = "interleaved" if family == "llama" else "half"
    embedding = tensors.get("token_embd.weight")
    return ModelSpec(
        family=family,
        layers=field("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        feed_forward=field("feed_forward_length"),
        vocabulary=embedding.shape[0] if embedding else 0,
        context_tokens=field("context_length"),
        norm_epsilon=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base", 10000.0),
        rope_scaling=None,
        pairing=pairing,
        end_tokens=_end_tokens(metadata),
        tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
    )


def _number(metadata: dict[str, Any], key: str, default: Any = None) -> Any:
    """A metadata value that must be a number; without a default it must be there."""
    value = metadata.get(key, default)
    if value is None:
        raise BackendMisconfigured(f"model: the GGUF metadata lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BackendMisconfigured(f"model: {key} in the GGUF metadata must be one number")
    return value


def _refuse_scaling(metadata: dict[str, Any], family: str, tensors: dict[str, Stored]) -> None:
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise BackendMisconfigured(
            f"model: {family}.rope.scaling.type {scaling!r} in a GGUF file is not supported;"
            " load the Hugging Face folder instead"
        )


def _end_tokens(metadata: dict[str, Any]) -> tuple[int, ...]:
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = {_number(metadata, f"tokenizer.ggml.{name}", -1) for name in names}
    return tuple(sorted(found - {-1}))
