"""Promises about KV that the target of a handoff has already."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec

from transfer.contract import KVSlice, Proof
from transfer.digest import landing_key, prove
from transfer.errors import DigestMismatch, KeptChanged
from transfer.stage import (
    TARGET,
    TARGET_BLOCKS,
    TOKENS,
    MakePair,
    Stage,
    eventually,
    refused,
    require,
)

KEPT = 2
"""Blocks that lie there already, full of other numbers than the source's, so that a write shows."""

PRESENT = KEPT * TARGET.block_tokens


async def what_is_present_is_not_sent(make: MakePair) -> None:
    """The rest arrives and is proven; the blocks that were there are not written to."""
    async with _kept(make) as stage:
        wanted = stage.wanted()
        for place in _bytes_of(stage):
            wanted[place] = stage.before[place]
        receipt = await stage.hand_over()
        require(bool((stage.pool == wanted).all()), "the pool holds something else")
        require(receipt.bytes == (TOKENS - PRESENT) * TARGET.token_bytes, f"{receipt.bytes} bytes")
        proofs, landing = stage.arrivals[0].proofs, stage.landing
        whole = landing.blocks[: TOKENS // TARGET.block_tokens]
        right = prove(TARGET, stage.pool, TARGET_BLOCKS, whole, KEPT, landing_key(landing))
        require(list(proofs) == right, "what arrived was not proven as it lies there")


async def what_is_present_renews_the_lease(make: MakePair) -> None:
    """A sender that has got no further than what is there already is at work all the same."""
    async with _kept(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, PRESENT))
        await eventually(lambda: stage.touches > 0, "a slice went unnoticed")
        await writer.abort()


async def damage_to_what_is_present_is_caught(make: MakePair) -> None:
    """A bit that has flipped since the block was kept fails the landing, and says which block."""
    async with _kept(make) as stage:
        stage.pool[_bytes_of(stage)[1].stop - 1] ^= 0x04
        await refused(stage.hand_over(), DigestMismatch)
        require(not stage.arrivals, "it was admitted")
        (failure,) = stage.failures
        require(isinstance(failure, KeptChanged), f"the owner was told {failure!r}")
        require(getattr(failure, "block", None) == 1, f"another block was blamed: {failure}")


async def a_writer_that_sends_all_is_refused(make: MakePair) -> None:
    """One that does not know what is present changes none of it."""
    async with _kept(make) as stage:
        await refused(stage.hand_over(msgspec.structs.replace(stage.landing, present=0)))
        for place in _bytes_of(stage):
            unharmed = bool((stage.pool[place] == stage.before[place]).all())
            require(unharmed, "what was there has been written to")
        require(not stage.arrivals, "it was even committed")


@contextlib.asynccontextmanager
async def _kept(make: MakePair) -> AsyncIterator[Stage]:
    """A stage whose landing has its first blocks already, each proven under a key of its own."""
    async with make(TARGET) as pair:
        stage = Stage(pair)
        stage.receiver.withdraw(stage.landing.id)
        blocks = stage.landing.blocks[:KEPT]
        proofs: list[Proof] = []
        for place in range(KEPT):
            some = blocks[: place + 1]
            proofs += prove(TARGET, stage.pool, TARGET_BLOCKS, some, place, b"%d" % place)
        stage.landing = msgspec.structs.replace(stage.landing, id="kept", present=PRESENT)
        stage.expect(proofs)
        yield stage


def _bytes_of(stage: Stage) -> list[slice]:
    """Where the blocks that are present lie in the pool."""
    size = TARGET.block_bytes
    return [slice(it * size, (it + 1) * size) for it in stage.landing.blocks[:KEPT]]
