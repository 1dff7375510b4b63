"""`baton roofline PROFILE --model SHAPE`: how fast an accelerator would be, by its figures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from backends.emulation.profile import WEIGHT_BYTES, Profile, load_profile, load_shape, names
from backends.emulation.roofline import Roofline
from backends.errors import BackendMisconfigured
from gateway.settings import ConfigError, Problem
from transfer.layout import ITEM_BYTES

PROMPTS = (128, 512, 2048, 8192)
BATCHES = (1, 8, 32, 128)
CONTEXTS = (512, 2048, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("profile", help=f"a TOML file, or one of {', '.join(names('profiles'))}")
    parser.add_argument(
        "--model",
        required=True,
        help=f"a TOML file, a model's config.json, or one of {', '.join(names('shapes'))}",
    )
    parser.add_argument("--weights", choices=sorted(WEIGHT_BYTES), default="bfloat16")
    parser.add_argument("--kv", choices=sorted(ITEM_BYTES), default="bfloat16", help="dtype of KV")
    parser.add_argument("--devices", type=int, default=1, help="accelerators that share the model")
    parser.add_argument("--chunk", type=int, default=2048, help="most prompt tokens in one step")


def predict(options: argparse.Namespace) -> list[str]:
    """The lines to print.

    Raises:
        ConfigError: an argument cannot be used.
    """
    try:
        profile, shape = load_profile(options.profile), load_shape(options.model)
        for name in ("devices", "chunk"):
            if getattr(options, name) < 1:
                raise BackendMisconfigured(f"{name}: must be 1 or more")
        roofline = Roofline(
            profile,
            shape,
            weights=options.weights,
            kv_bytes=ITEM_BYTES[options.kv],
            devices=options.devices,
        )
    except BackendMisconfigured as error:
        raise ConfigError(Problem("roofline", "", str(error))) from error
    fits = max(0, roofline.pool_tokens)
    weights = f"{shape.weights / 1e9:.2f} billion weights in {options.weights}"
    room = f"room for {fits:,} tokens of KV beside the weights"
    return [
        f"EMULATED: {roofline.title}; {weights}, {roofline.kv_token_bytes:,} bytes of KV a token",
        room if fits else "THE WEIGHTS DO NOT FIT: give more --devices",
        "",
        *_prefill(roofline, options.chunk),
        "",
        *_decode(roofline, fits),
        "",
        *_sources(profile),
    ]


def _prefill(roofline: Roofline, chunk: int) -> Iterator[str]:
    yield f"{'prompt':>8} {'prefill, ms':>12} {'tokens/s':>10} {'handoff, ms':>12}"
    for tokens in PROMPTS:
        seconds = roofline.prefill_seconds(tokens, chunk)
        moved = roofline.handoff_seconds(tokens) * 1e3
        yield f"{tokens:>8} {seconds * 1e3:>12.2f} {tokens / seconds:>10.0f} {moved:>12.2f}"


def _decode(roofline: Roofline, fits: int) -> Iterator[str]:
    yield f"{'decode step, ms':16}" + "".join(f"{f'context {it}':>16}" for it in CONTEXTS)
    for batch in BATCHES:
        yield f"{f'batch {batch}':16}" + "".join(
            f"{roofline.decode_seconds(batch, context) * 1e3:>16.2f}"
            if batch * (context + 1) <= fits
            else f"{'no room':>16}"
            for context in CONTEXTS
        )


def _sources(profile: Profile) -> Iterator[str]:
    yield "the longer of arithmetic and reading, part by part; the figures and their sources:"
    for name in type(profile).__struct_fields__:
        value = getattr(profile, name)
        figures = {f"{name}.{key}": it for key, it in value.items()} if name == "flops" else {}
        if name not in ("name", "flops"):
            figures = {name: value}
        for label, figure in figures.items():
            yield f"  {label:26} {figure.value:<10.4g} {figure.source}"
