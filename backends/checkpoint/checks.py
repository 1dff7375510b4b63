"""Check options that every engine with a checkpoint and a pool has; errors name the option."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, get_args

import msgspec

from backends.checkpoint.spec import ModelSpec
from backends.errors import BackendMisconfigured
from transfer.layout import AXES, DType

Kind = TypeVar("Kind")

Progress = Callable[[str, float], None]
"""Called while loading, with a phase and how much of it is done."""

DEFAULT_AXES = "block layer kv head token dim"
DEFAULT_POOL_TOKENS = 16384

_MOST_THREADS = 1024
_MOST_TOKENS = 1 << 32

MOST = {
    "threads": _MOST_THREADS,
    "pool_tokens": _MOST_TOKENS,
    "pool_blocks": _MOST_TOKENS,
    "block_tokens": 256,
    "context_tokens": 1 << 24,
    "max_batch": 1 << 16,
    "shards": 256,
}
"""The largest values of whole-numbered options."""


def check_whole(name: str, value: int | None, most: int, least: int = 1) -> None:
    """Refuse a number outside its bounds. None is an option that was not given."""
    if value is not None and not (type(value) is int and least <= value <= most):
        raise BackendMisconfigured(f"{name} must be a whole number {least} to {most}, is {value!r}")


def check_axes(axes: str) -> None:
    """Refuse an order of axes that `KVLayout` would."""
    words = axes.split()
    if len(words) != len(AXES) or set(words) != AXES or words[-1] != "dim":
        raise BackendMisconfigured(
            f"axes must name {', '.join(sorted(AXES))} once each, dim last; is {axes!r}"
        )


def check_memory(name: str, wanted_bytes: int) -> None:
    """Refuse a pool larger than this machine's memory, before the kernel kills the process."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted_bytes > installed:
        raise BackendMisconfigured(
            f"{name}: the pool would take {wanted_bytes / 1e9:.1f} GB of"
            f" {installed / 1e9:.1f} GB of memory"
        )


def check_pool(pool_tokens: int | None, pool_blocks: int | None) -> None:
    """Refuse a pool whose size is given twice."""
    if pool_tokens is not None and pool_blocks is not None:
        raise BackendMisconfigured("pool_tokens and pool_blocks exclude each other: give one")


def blocks_of(pool_tokens: int | None, pool_blocks: int | None, block_tokens: int) -> int:
    """Blocks in the pool, from whichever of the two options was given."""
    if pool_blocks is not None:
        return pool_blocks
    return -(-(pool_tokens or DEFAULT_POOL_TOKENS) // block_tokens)


def check_context(spec: ModelSpec, wanted: int | None, pool_tokens: int) -> int:
    """How long a sequence may be, of a pool that holds `pool_tokens`."""
    if wanted is not None and wanted > spec.context_tokens:
        raise BackendMisconfigured(
            f"context_tokens is {wanted}, but the model was made for {spec.context_tokens}"
        )
    return min(wanted or spec.context_tokens, pool_tokens)


def as_dtype(name: str) -> DType:
    """A checked dtype option, as the layout's type."""
    assert name in get_args(DType)
    return cast("DType", name)


def converted(values: Mapping[str, Any], kind: type[Kind]) -> Kind:
    """The keyword arguments of a backend as a struct.

    Raises:
        BackendMisconfigured: names the first option that has another type, and says how.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise BackendMisconfigured(_readable(str(error))) from None


def _readable(message: str) -> str:
    """Turn "Expected `int`, got `str` - at `$.threads`" into one that begins with the option."""
    problem, _, place = message.partition(" - at `$.")
    return f"{place.rstrip('`')}: {problem}" if place else message
