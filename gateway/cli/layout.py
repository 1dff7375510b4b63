"""`baton layout explain A B`: what a handoff from one pool to another will do."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from gateway.settings import ConfigError, Problem
from transfer.errors import LayoutMismatch
from transfer.explain import explain
from transfer.layout import KVLayout


def read_layout(path: Path) -> KVLayout:
    """A layout from a TOML or JSON file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return msgspec.json.decode(text, type=KVLayout)
        return msgspec.convert(tomllib.loads(text), KVLayout)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(Problem(str(path), "", str(error))) from error


def explain_layouts(source: Path, target: Path, tokens: int, *, allow_unlike: bool) -> list[str]:
    """What happens to `tokens` tokens on their way from one layout to the other.

    Raises:
        ConfigError: a file holds no layout, or they cannot be converted.
    """
    layouts = read_layout(source), read_layout(target)
    try:
        return explain(*layouts, tokens, allow_unlike_weights=allow_unlike)
    except (LayoutMismatch, MemoryError) as error:
        raise ConfigError(Problem(f"{source} -> {target}", "", str(error))) from error
