"""Open whichever kind of checkpoint a path names."""

from __future__ import annotations

from pathlib import Path

from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.checkpoint.huggingface import HuggingFaceCheckpoint
from backends.checkpoint.spec import Checkpoint
from backends.errors import BackendMisconfigured


def check_model_path(model: str) -> Path:
    """A `.gguf` file or a folder with `config.json`."""
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    raise BackendMisconfigured(
        f"model: {model!r} is neither a .gguf file nor a folder with config.json"
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path that was checked.

    Raises:
        BackendMisconfigured: names what in it is damaged or not supported.
    """
    return HuggingFaceCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)
