"""Promises about what was changed, lost or exchanged on its way: it is not admitted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from transfer.contract import KVSlice
from transfer.errors import DigestMismatch
from transfer.stage import (
    PATIENCE_SECONDS,
    SOURCE,
    TARGET,
    TARGET_BLOCKS,
    TOKENS,
    MakePair,
    Stage,
    on_stage,
    refused,
    require,
)


async def digest_catches_a_flipped_bit(make: MakePair) -> None:
    """One bit that changed in the pool after the writes refuses the handoff."""
    async with on_stage(make) as stage:

        def flip() -> None:
            stage.pool[2 * TARGET.block_bytes + 5] ^= 0x01

        await _caught(stage, flip)


async def digest_catches_a_stale_page(make: MakePair) -> None:
    """A block that still holds what was there before refuses the handoff."""
    async with on_stage(make) as stage:
        block = slice(3 * TARGET.block_bytes, 4 * TARGET.block_bytes)

        def restore() -> None:
            stage.pool[block] = stage.before[block]

        await _caught(stage, restore)


async def digest_catches_swapped_layers(make: MakePair) -> None:
    """Two layers in each other's place refuse the handoff."""
    async with on_stage(make) as stage:
        await _caught(stage, lambda: _swap(stage, "layer"))


async def digest_catches_k_in_place_of_v(make: MakePair) -> None:
    """K and V in each other's place refuse the handoff."""
    async with on_stage(make) as stage:
        await _caught(stage, lambda: _swap(stage, "kv"))


async def digest_catches_swapped_tokens(make: MakePair) -> None:
    """Two tokens in each other's place refuse the handoff."""
    async with on_stage(make) as stage:
        await _caught(stage, lambda: _swap(stage, "token"))


async def a_damaged_note_is_refused(make: MakePair) -> None:
    """A note that is not as it was sent refuses the handoff, and the next is not refused."""
    async with make(TARGET) as pair:
        if pair.damage_notes is None:
            return
        stage, another = Stage(pair), Stage(pair, 2)
        with pair.damage_notes():
            await refused(stage.hand_over(), DigestMismatch)
        require(not stage.arrivals, "it arrived")
        kinds = [type(it) for it in stage.failures]
        require(kinds == [DigestMismatch], f"the owner was told {kinds}")
        await another.hand_over()
        require([it.note for it in another.arrivals] == [b"note"], "the next did not arrive")


async def a_slice_that_was_never_written_is_caught(make: MakePair) -> None:
    """A commit before all of the prefix was written is refused."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        for layer in range(SOURCE.layers - 1):
            await writer.write(KVSlice(layer, 0, TOKENS))
        await refused(writer.commit(b"", PATIENCE_SECONDS), DigestMismatch)
        await writer.abort()
        require(len(stage.failures) == 1, f"the owner was told {stage.failures}")


async def _caught(stage: Stage, damage: Callable[[], None]) -> None:
    """After all was written, `damage` the pool: the commit is refused and the owner told once."""
    writer = await stage.sender.open(stage.landing, stage.source)
    await stage.write_all(writer)
    await stage.landed()
    damage()
    require(bool((stage.pool != stage.wanted()).any()), "the damage changed nothing")
    await refused(writer.commit(b"", PATIENCE_SECONDS), DigestMismatch)
    await writer.abort()
    require(not stage.arrivals, "it arrived")
    kinds = [type(it) for it in stage.failures]
    require(kinds == [DigestMismatch], f"the owner was told {kinds}")


def _swap(stage: Stage, axis: str) -> None:
    """Exchange places 0 and 1 along one axis, within the landing's first block."""
    sizes = TARGET.sizes(TARGET_BLOCKS)
    pool = stage.pool.view(np.uint16).reshape(tuple(sizes.values()))
    block = np.moveaxis(pool[stage.landing.blocks[0]], list(sizes).index(axis) - 1, 0)
    block[[0, 1]] = block[[1, 0]]
