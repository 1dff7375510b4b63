"""What the processes at the far end of a test hand over, and into what."""

import functools

import numpy as np

from transfer.contract import Source
from transfer.layout import Epoch, KVLayout, Landing

# 4 MiB a layer for 1,024 tokens, in runs of 64 KiB.
LAYOUT = KVLayout(
    model="far",
    weights="float16",
    layers=4,
    kv_heads=8,
    head_dim=128,
    dtype="float16",
    block_tokens=16,
    rope="half",
    axes="block layer kv token head dim",
)
TOKENS = 1024
BLOCKS = LAYOUT.blocks_for(TOKENS)
POOL_BYTES = BLOCKS * LAYOUT.block_bytes


def landing_at(endpoint, counter=1):
    return Landing(
        id=f"far-{counter}",
        epoch=Epoch(1, counter),
        secret=b"s" * 16,
        worker="decode",
        endpoints=(endpoint,),
        layout=LAYOUT,
        pool_blocks=BLOCKS,
        blocks=tuple(range(BLOCKS)),
        tokens=TOKENS,
        lease_seconds=60.0,
    )


@functools.cache
def source():
    pool = np.random.default_rng(3).integers(1, 255, POOL_BYTES, dtype=np.uint8)
    return Source(LAYOUT, pool, BLOCKS, tuple(range(BLOCKS)), TOKENS)


def say(*words):
    print(*words, flush=True)
