"""What is right, found out without the code under test.

The KV of a prompt is small numbers that every dtype here represents exactly, so that a pool is
compared to the bit. Addresses come from numpy's own reshape and transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from transfer.layout import KVLayout

Numbers = np.ndarray[Any, np.dtype[Any]]

PAIRS: tuple[tuple[str, str, str, int], ...] = (
    ("layer kv block token head dim", "bfloat16", "half", 2),
    ("block layer kv head token dim", "float32", "interleaved", 4),
    ("layer block kv token head dim", "float16", "half", 3),
)
"""Axes, dtype, RoPE pairing and block size of the decode pools; a schedule has one of them."""

CANONICAL = ("block", "token", "layer", "kv", "head", "dim")
WORDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
PROMPTS = 5

SOURCE = KVLayout(
    model="chaos",
    weights="float32",
    layers=2,
    kv_heads=2,
    head_dim=4,
    dtype="float32",
    block_tokens=4,
    rope="half",
    axes="block layer kv head token dim",
)


@cache
def target(number: int) -> KVLayout:
    """The layout of the decode pools in schedules of this kind."""
    axes, dtype, rope, block_tokens = PAIRS[number]
    fields = {name: getattr(SOURCE, name) for name in ("layers", "kv_heads", "head_dim")}
    return KVLayout(
        model="chaos",
        weights="float32",
        axes=axes,
        dtype=dtype,  # type: ignore[arg-type]
        rope=rope,  # type: ignore[arg-type]
        block_tokens=block_tokens,
        **fields,
    )


@cache
def tokens_of(prompt: int) -> int:
    """How long a prompt is; 1 to 9 tokens."""
    return 1 + 2 * prompt


@cache
def kv_of(prompt: int) -> Numbers:
    """The true KV of a prompt, of shape (token, layer, kv, head, dim), float32."""
    random = np.random.default_rng(prompt)
    shape = (tokens_of(prompt), SOURCE.layers, 2, SOURCE.kv_heads, SOURCE.head_dim)
    whole = random.integers(1, 128, shape) * random.choice([-1, 1], shape)
    return (whole * 2.0 ** -random.integers(0, 7, shape)).astype(np.float32)


@cache
def words_of(prompt: int, number: int) -> Numbers:
    """The true KV as the bits that must lie in a decode pool; same shape."""
    layout = target(number)
    kv = kv_of(prompt)
    if layout.rope == "interleaved":  # only K has positions in it
        half = layout.head_dim // 2
        kv = kv.copy()
        keys = kv[:, :, 0].copy()
        kv[:, :, 0, :, 0::2], kv[:, :, 0, :, 1::2] = keys[..., :half], keys[..., half:]
    if layout.dtype == "bfloat16":
        return (kv.view(np.uint32) >> 16).astype(np.uint16)
    return kv.astype(layout.dtype).view(WORDS[layout.dtype])


def table(pool: Numbers, layout: KVLayout, blocks: int) -> Numbers:
    """A view of a whole pool, of shape (block, token, layer, kv, head, dim)."""
    sizes = {
        "block": blocks,
        "token": layout.block_tokens,
        "layer": layout.layers,
        "kv": 2,
        "head": layout.kv_heads,
        "dim": layout.head_dim,
    }
    axes = layout.axes.split()
    shaped = pool.view(WORDS[layout.dtype]).reshape([sizes[axis] for axis in axes])
    return shaped.transpose([axes.index(axis) for axis in CANONICAL])


def places(blocks: Sequence[int], tokens: int, block_tokens: int) -> tuple[Numbers, Numbers]:
    """Block and place within it of every token of a prefix: indices into `table`."""
    token = np.arange(tokens)
    return np.asarray(blocks)[token // block_tokens], token % block_tokens
