"""A vocabulary from a model's files: a GGUF file, or a folder in Hugging Face form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from gateway.text.bpe import tokenizer_of
from gateway.text.errors import ModelUnreadable
from gateway.text.gguf_metadata import read_metadata
from gateway.text.template import ChatTemplate
from gateway.text.vocabulary import Vocabulary

ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""What a GGUF file calls a special token, and what chat templates call it."""


def load_text(source: str | Path) -> Vocabulary:
    """The vocabulary of the model at `source`.

    Raises:
        ModelUnreadable: the files are missing, broken, or of a kind that is not supported.
    """
    path = Path(source)
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def _from_gguf(path: Path) -> Vocabulary:
    metadata = read_metadata(
        path,
        lambda key: (
            key.startswith("tokenizer.")
            or key == "general.architecture"
            or key.endswith(".context_length")
        ),
    )
    tokenizer = tokenizer_of(metadata)
    names = {}
    for ours, theirs in ROLES.items():
        token = metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if isinstance(token, int):
            names[f"{theirs}_token"] = tokenizer.id_to_token(token) or ""
    source = metadata.get("tokenizer.chat_template")
    key = f"{metadata.get('general.architecture')}.context_length"
    return Vocabulary(
        tokenizer,
        context_tokens=_context(path, key, metadata.get(key)),
        template=ChatTemplate(source, names) if isinstance(source, str) else None,
        byte_level=True,
    )


def _from_folder(folder: Path) -> Vocabulary:
    config = _read(folder / "config.json")
    settings = _read(folder / "tokenizer_config.json", optional=True)
    path = folder / "tokenizer.json"
    try:
        definition = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(definition)
        decoder = msgspec.json.decode(definition).get("decoder") or {}
    except Exception as error:  # the library raises nothing narrower
        raise ModelUnreadable(f"{path}: {error}") from error
    source = _template(folder, settings)
    tokens = (f"{role}_token" for role in ROLES.values())
    names = {name: text for name in tokens if (text := _text(settings.get(name)))}
    key = "max_position_embeddings"
    return Vocabulary(
        tokenizer,
        context_tokens=_context(folder / "config.json", key, config.get(key)),
        template=ChatTemplate(source, names) if source else None,
        byte_level=decoder.get("type") == "ByteLevel",
    )


def _context(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ModelUnreadable(f"{path} has no {key}")
    return value


def _read(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelUnreadable(f"{path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise ModelUnreadable(f"{path}: {error}") from error


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _text(token: Any) -> str | None:
    """A special token is its text, or an object that has it as `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
