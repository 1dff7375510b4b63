"""The timing of an accelerator's profile, as options of a backend ask for it.

`profile` names it (see `profile.py`), `model_shape` the model whose arithmetic and reading are
counted, `weights` the dtype of its matrices, `devices` how many such accelerators hold it between
them. Everything takes `slower` times as long, for where this machine could not keep up: all of it
alike, so that what the ratios say stays true.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import msgspec
import structlog

from backends.api import Row
from backends.emulation.checks import one_of, seconds, whole
from backends.emulation.profile import Shape, Weights, load_profile, load_shape
from backends.emulation.roofline import Roofline, Span
from backends.errors import BackendMisconfigured

log = structlog.get_logger()

MOST_DEVICES = 1 << 16
TELL_AGAIN_SECONDS = 60.0


class Timing:
    """How long steps take, and what fits."""

    def __init__(self, roofline: Roofline, slower: float, title: str) -> None:
        self.roofline = roofline
        self.title = title
        self._slower = slower
        self._told_at = float("-inf")

    def seconds(self, batch: Iterable[Row]) -> float:
        """A step that computes `batch`."""
        spans = (Span(row.start, row.start + len(row.tokens), len(row.sequences)) for row in batch)
        return self.roofline.step_seconds(spans) * self._slower

    def check_room(self, option: str, tokens: int) -> None:
        """Refuse a pool that the accelerator has no room for.

        Raises:
            BackendMisconfigured: names the option, and how many tokens fit.
        """
        most = self.roofline.pool_tokens
        if most < 1:
            raise BackendMisconfigured(
                f"profile: the weights do not fit into {self.roofline.title}; give more `devices`"
            )
        if tokens > most:
            raise BackendMisconfigured(
                f"{option}: {tokens} tokens, but beside the weights {self.roofline.title} has room"
                f" for {most}"
            )

    def overran(self, late: int, steps: int) -> None:
        """Say, but not each time, that `late` of `steps` took longer than on the accelerator."""
        if time.monotonic() - self._told_at >= TELL_AGAIN_SECONDS:
            self._told_at = time.monotonic()
            log.warning("step.overran", emulates=self.title, late=late, steps=steps)


def read_timing(
    profile: str | None,
    model_shape: str | None,
    own: Shape | None,
    *,
    weights: str,
    kv_bytes: int,
    devices: int,
    slower: float,
) -> Timing | None:
    """What the options say; None without a profile. `own` is the shape where none is named.

    Raises:
        BackendMisconfigured: names the option that is wrong.
    """
    chosen = one_of("weights", weights, get_args(Weights))
    count = whole("devices", devices, 1, MOST_DEVICES)
    factor = seconds("slower", slower)
    if profile is None:
        if count != 1 or factor != 1.0:
            raise BackendMisconfigured("profile: `devices` and `slower` say nothing without one")
        return None
    if factor <= 0:
        raise BackendMisconfigured(f"slower: must be more than 0; got {slower!r}")
    shape = load_shape(model_shape) if model_shape is not None else own
    if shape is None:
        raise BackendMisconfigured("model_shape: must be given with `profile`")
    roofline = Roofline(
        load_profile(profile),
        shape,
        weights=msgspec.convert(chosen, Weights),
        kv_bytes=kv_bytes,
        devices=count,
    )
    title = roofline.title
    if model_shape is not None:
        title += f", {Path(model_shape).name.removesuffix('.toml')}"
    if factor != 1.0:
        title += f", {factor:g} times slower"
    return Timing(roofline, factor, title)
