"""A copy of a GGUF file whose tensors are all float32, for llama.cpp to compute without rounding.

Metadata are copied as they are. Numbers are those that every engine of ours dequantises, so that
float32 engines agree in what they load.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import structlog

from backends.checkpoint.checks import Progress
from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.errors import BackendMisconfigured

log = structlog.get_logger()

_FLOAT32 = int(gguf.GGMLQuantizationType.F32)


def float32_copy(checkpoint: GGUFCheckpoint, folder: str, progress: Progress) -> Path:
    """The copy of `checkpoint` in `folder`, written if it is not there.

    Without a `folder`: `$XDG_CACHE_HOME/baton`, or `~/.cache/baton`.

    Raises:
        BackendMisconfigured: it cannot be written.
    """
    home = Path(folder) if folder else _cache_home()
    target = home / f"{checkpoint.identity}-float32.gguf"
    if _whole(target, checkpoint):
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        _write(checkpoint, target, progress)
    except OSError as error:
        raise BackendMisconfigured(f"cache_dir: cannot write {target}: {error}") from error
    log.info("model.converted", path=str(target), bytes=target.stat().st_size)
    return target


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "baton"


def _whole(target: Path, checkpoint: GGUFCheckpoint) -> bool:
    """Whether the file is there, with every tensor; it came there in one piece or not at all."""
    if not target.is_file():
        return False
    try:
        found = GGUFCheckpoint(target)
    except BackendMisconfigured:
        return False
    whole = found.spec == checkpoint.spec and found.names() == checkpoint.names()
    found.close()
    return whole


def _write(checkpoint: GGUFCheckpoint, target: Path, progress: Progress) -> None:
    names = sorted(checkpoint.names())
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            aligned = checkpoint.alignment
            header = b"".join(_header(checkpoint, names))
            file.write(header + bytes(-len(header) % aligned))
            for done, tensor in enumerate(names):
                progress("convert", done / len(names))
                raw = checkpoint.tensor(tensor).tobytes()
                file.write(raw + bytes(-len(raw) % aligned))
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _header(checkpoint: GGUFCheckpoint, names: list[str]) -> Iterator[bytes]:
    pairs, metadata = checkpoint.metadata
    yield struct.pack("<4sIQQ", b"GGUF", 3, len(names), pairs)
    yield metadata
    offset = 0
    for name in names:
        shape, text = checkpoint.shape(name), name.encode()
        yield struct.pack("<Q", len(text)) + text
        yield struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        yield struct.pack("<IQ", _FLOAT32, offset)
        size = math.prod(shape) * 4
        offset += size + -size % checkpoint.alignment
