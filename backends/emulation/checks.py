"""Check what the operator wrote under `[workers.X.options]`, naming the option that is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

import msgspec

from backends.errors import BackendMisconfigured
from transfer.layout import DType, KVLayout

DEFAULT_AXES = "block layer kv head token dim"
MOST_TOKENS = 1 << 31


def whole(name: str, value: Any, least: int, most: int = MOST_TOKENS) -> int:
    """`value` as an integer between `least` and `most`.

    Raises:
        BackendMisconfigured: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BackendMisconfigured(
            f"{name} must be a whole number from {least} to {most}; got {value!r}"
        )
    return value


def seconds(name: str, value: Any) -> float:
    """`value` as a finite duration.

    Raises:
        BackendMisconfigured: it is negative, endless or no number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise BackendMisconfigured(f"{name} must be a number of seconds, 0 or more; got {value!r}")
    return float(value)


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """`value`, which is among `allowed`.

    Raises:
        BackendMisconfigured: it is not.
    """
    names = tuple(allowed)
    if value not in names:
        raise BackendMisconfigured(f"{name} must be one of {', '.join(names)}; got {value!r}")
    return str(value)


def token_ids(name: str, value: Any, vocabulary: int) -> tuple[int, ...]:
    """`value` as ids below `vocabulary`.

    Raises:
        BackendMisconfigured: it is no list, or an id is out of range.
    """
    if not isinstance(value, (list, tuple)):
        raise BackendMisconfigured(f"{name} must be a list of token ids; got {value!r}")
    return tuple(whole(f"{name}[{i}]", token, 0, vocabulary - 1) for i, token in enumerate(value))


def checked_layout(**fields: Any) -> KVLayout:
    """A layout whose every field was checked.

    Raises:
        BackendMisconfigured: names the field.
    """
    one_of("dtype", fields["dtype"], get_args(DType))
    try:
        return msgspec.convert(fields, KVLayout)
    except msgspec.ValidationError as error:
        raise BackendMisconfigured(str(error)) from error


def blocks_in(pool_tokens: Any, block_tokens: int) -> int:
    """How many blocks a pool of `pool_tokens` has.

    Raises:
        BackendMisconfigured: not one.
    """
    return whole("pool_tokens", pool_tokens, block_tokens) // block_tokens
