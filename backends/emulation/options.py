"""The options of the emulation backend, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec

from backends.errors import BackendMisconfigured
from transfer.layout import AXES, DType

Progress = Callable[[str, float], None]

DEFAULT_AXES = "block layer kv head token dim"
DEFAULT_POOL_TOKENS = 16384

_MOST_THREADS = 1024
_MOST_TOKENS = 1 << 32


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `EmulationBackend`."""

    model: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    pool_tokens: int | None = None
    pool_blocks: int | None = None
    block_tokens: int = 16
    axes: str = DEFAULT_AXES
    context_tokens: int | None = None
    rope: Literal["auto", "half", "interleaved"] = "auto"
    max_batch: int = 256
    shards: int = 1

    @property
    def blocks(self) -> int:
        """Blocks in the pool, from whichever of the two options was given."""
        if self.pool_blocks is not None:
            return self.pool_blocks
        return -(-(self.pool_tokens or DEFAULT_POOL_TOKENS) // self.block_tokens)


def read_options(values: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of a backend.

    Raises:
        BackendMisconfigured: names the first option that is wrong, and says how.
    """
    try:
        options = msgspec.convert(values, Options)
    except msgspec.ValidationError as error:
        raise BackendMisconfigured(_readable(str(error))) from None
    for name, most in (
        ("threads", _MOST_THREADS),
        ("pool_tokens", _MOST_TOKENS),
        ("pool_blocks", _MOST_TOKENS),
        ("block_tokens", 256),
        ("context_tokens", 1 << 24),
        ("max_batch", 1 << 16),
        ("shards", 256),
    ):
        check_whole(name, getattr(options, name), most)
    check_axes(options.axes)
    if options.shards > 1 and options.device != "cpu":
        raise BackendMisconfigured("shards: only where device is cpu")
    if options.pool_tokens is not None and options.pool_blocks is not None:
        raise BackendMisconfigured("pool_tokens and pool_blocks exclude each other: give one")
    return options


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


def as_dtype(name: str) -> DType:
    """A checked dtype option, as the layout's type."""
    assert name in get_args(DType)
    return cast("DType", name)


def _readable(message: str) -> str:
    """Turn "Expected `int`, got `str` - at `$.threads`" into one that begins with the option."""
    problem, _, place = message.partition(" - at `$.")
    return f"{place.rstrip('`')}: {problem}" if place else message
