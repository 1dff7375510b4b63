"""Promises about handoffs that go as they should, and about what their owner is told."""

from __future__ import annotations

import asyncio

from transfer.contract import TOUCH_SECONDS, Arrival, KVSlice
from transfer.errors import LandingGone
from transfer.stage import (
    PATIENCE_SECONDS,
    SOURCE,
    TARGET,
    TOKENS,
    MakePair,
    Stage,
    eventually,
    on_stage,
    refused,
    require,
)


async def a_handoff_arrives_bit_for_bit(make: MakePair) -> None:
    """What is committed lies in the landing's blocks, and nothing else has changed."""
    async with on_stage(make) as stage:
        receipt = await stage.hand_over()
        require(bool((stage.pool == stage.wanted()).all()), "the pool holds something else")
        require(len(stage.arrivals) == 1, f"the owner was told {len(stage.arrivals)} times")
        arrival = stage.arrivals[0]
        require(arrival.note == b"note", f"the note became {arrival.note!r}")
        require(arrival.epoch == stage.landing.epoch, "the epoch is another")
        require(receipt.answer == b"taken: note", f"the answer became {receipt.answer!r}")
        require(receipt.bytes == TOKENS * TARGET.token_bytes, f"{receipt.bytes} bytes")
        require(not stage.failures, f"the owner was also told of {stage.failures}")


async def a_write_renews_the_lease(make: MakePair) -> None:
    """`touched` is called for every write that comes a while after the last one."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        for layer in range(SOURCE.layers):
            before = stage.touches
            await writer.write(KVSlice(layer, 0, TOKENS))
            await eventually(lambda seen=before: stage.touches > seen, "a write went unnoticed")  # type: ignore[misc]
            await asyncio.sleep(1.2 * TOUCH_SECONDS)
        await writer.abort()


async def many_handoffs_share_a_pair(make: MakePair) -> None:
    """Handoffs at the same time do not get into each other's way."""
    async with make(TARGET) as pair:
        stages = [Stage(pair, number) for number in range(1, 9)]
        async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
            for stage in stages:
                group.create_task(stage.hand_over())
        for stage in stages:
            right = stage.pool[stage.mine] == stage.wanted()[stage.mine]
            require(bool(right.all()), "a pool holds something else")


async def an_owner_may_decline(make: MakePair) -> None:
    """`arrived` may raise `LandingGone`; the sender hears that."""
    async with make(TARGET) as pair:
        stage = Stage(pair)
        stage.receiver.withdraw(stage.landing.id)

        def decline(arrival: Arrival) -> bytes:
            raise LandingGone("cancelled meanwhile")

        stage.receiver.expect(
            stage.landing, stage.pool, touched=lambda: None, arrived=decline, failed=lambda _: None
        )
        await refused(stage.hand_over(), LandingGone)
