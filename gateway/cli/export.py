"""`baton export`: a model as a folder in Hugging Face form, for engines that read no GGUF file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from backends.checkpoint.folder import write_folder
from backends.checkpoint.gguf_file import GGUFCheckpoint
from gateway.cli.model import find_model
from gateway.text.bpe import tokenizer_of
from gateway.text.gguf_metadata import read_metadata
from gateway.text.load import ROLES


def export(source: str, folder: Path) -> Path:
    """Write the GGUF file that `source` means as a folder; the file that it was.

    Raises:
        ValueError: there is no such file.
        ModelUnreadable: its vocabulary is of a kind that is not supported.
        BackendMisconfigured: its weights are, or the folder cannot be written.
    """
    path = find_model(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder in Hugging Face form already")
    with closing(GGUFCheckpoint(path)) as checkpoint:
        write_folder(checkpoint, folder, vocabulary_files(path))
    return path


def vocabulary_files(path: Path) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` of a GGUF file."""
    metadata = read_metadata(path, lambda key: key.startswith("tokenizer."))
    tokenizer = tokenizer_of(metadata)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in ROLES.items():
        token = metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if isinstance(token, int):
            settings[f"{theirs}_token"] = tokenizer.id_to_token(token)
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": msgspec.json.encode(settings),
    }
