"""The table of all settings, as the README shows it, made from their declarations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from gateway.config import Config, Section, WorkerSection

BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def settings_table() -> str:
    """Markdown: one row per setting."""
    rows = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    rows += [" | ".join(["", *row, ""]).strip() for row in _rows(Config, "")]
    return "\n".join(rows)


def _rows(section: type[Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        hint = hints[field.name]
        name = f"{prefix}{field.name}"
        if hint == dict[str, WorkerSection]:
            yield from _rows(WorkerSection, f"{name}.NAME.")
        elif isinstance(hint, type) and issubclass(hint, Section):
            yield from _rows(hint, f"{name}.")
        else:
            meta = hint.__metadata__[0]
            unit = meta.extra["unit"]
            kind = _kind(hint.__origin__) + (f" ({unit})" if unit else "")
            yield f"`{name}`", kind, _default(field), meta.description


def _kind(declared: Any) -> str:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "table"
    return {str: "text", int: "integer", float: "number", bool: "boolean"}[declared]


def _default(field: Any) -> str:
    if field.required:
        return "*required*"
    if field.default is msgspec.NODEFAULT:
        return "`{}`"
    if field.default in ("", ()):
        return ""
    if isinstance(field.default, tuple):
        return f"`{', '.join(field.default)}`"
    return f"`{field.default}`"
