"""How a setting is declared: a field of a section, with what the table of settings says of it."""

from __future__ import annotations

from typing import Any

import msgspec


def about(description: str, *, unit: str = "", secret: bool = False, **bounds: Any) -> msgspec.Meta:
    """What the table of settings says of a field, and the bounds that are checked."""
    return msgspec.Meta(description=description, extra={"unit": unit, "secret": secret}, **bounds)


NAME_PATTERN = r"^[a-z0-9]([a-z0-9_.-]{0,62}[a-z0-9])?$"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file."""
