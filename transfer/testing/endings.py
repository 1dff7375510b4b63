"""Promises about handoffs that end badly: who is told, and when blocks are free again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from transfer.contract import KVSlice, Writer
from transfer.errors import LandingGone, PeerLost
from transfer.layout import Endpoint
from transfer.stage import (
    PATIENCE_SECONDS,
    SOURCE,
    TARGET,
    TOKENS,
    BrokenPromise,
    MakePair,
    Stage,
    eventually,
    on_stage,
    refused,
    require,
)


async def abort_frees_the_landing(make: MakePair) -> None:
    """An abort tells the owner, once, and nothing is accepted after it."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, 10))
        await writer.abort()
        await stage.told.wait()
        await writer.abort()
        require(len(stage.failures) == 1, f"the owner was told {stage.failures}")
        await refused(writer.write(KVSlice(1, 0, 10)))
        await refused(stage.hand_over(), LandingGone)


async def a_lost_sender_fails_its_landings(make: MakePair) -> None:
    """A sender that closes without a commit has its landings freed, each told once."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, 10))
        await eventually(lambda: stage.touches > 0, "the write did not arrive")
        await stage.sender.close()
        await eventually(lambda: bool(stage.failures), "the owner was not told")
        await refused(writer.write(KVSlice(1, 0, 10)))
        await writer.abort()
        require(len(stage.failures) == 1, f"the owner was told {stage.failures}")


async def withdrawn_landing_is_refused(make: MakePair) -> None:
    """After a withdrawal writes and commits are refused, and nobody is called."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, 10))
        stage.receiver.withdraw(stage.landing.id)
        stage.receiver.withdraw(stage.landing.id)
        await refused(_finish(stage, writer), LandingGone)
        await writer.abort()
        require(not stage.arrivals, "it arrived")
        require(not stage.failures, f"the owner was told {stage.failures}")


async def no_write_lands_after_quiesce(make: MakePair) -> None:
    """Once `quiesce` has returned, the pool stays as it is, whatever was under way."""
    async with make(TARGET) as pair:
        for number in range(1, 9):
            stage = Stage(pair, number)
            writer = await stage.sender.open(stage.landing, stage.source)
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(_finish(stage, writer))
                writing.add_done_callback(lambda it: it.cancelled() or it.exception())
                for _ in range(number):
                    await asyncio.sleep(0)
                writing.cancel()
                stage.receiver.withdraw(stage.landing.id)
                arrived = len(stage.arrivals)  # it may have been quicker than the withdrawal
                await _in_time(stage.receiver.quiesce(stage.landing.id))
                stage.pool[:] = 0xEE  # the next owner of these blocks
            await writer.abort()
            await asyncio.sleep(0.01)
            require(bool((stage.pool == 0xEE).all()), "a write landed after quiesce")
            require(len(stage.arrivals) == arrived, "it arrived after it was withdrawn")


async def no_write_of_a_stalled_sender_lands_after_quiesce(make: MakePair) -> None:
    """`quiesce` waits for a sender that is stuck within a write, or keeps its write out."""
    async with make(TARGET) as pair:
        if pair.stall is None:
            return
        stage = Stage(pair)
        writer = await stage.sender.open(stage.landing, stage.source)
        with pair.stall():
            writing = asyncio.ensure_future(writer.write(KVSlice(0, 0, TOKENS)))
            await asyncio.wait([writing], timeout=0.02)
            writing.cancel()
            stage.receiver.withdraw(stage.landing.id)
            quiet = asyncio.ensure_future(stage.receiver.quiesce(stage.landing.id))
            await asyncio.wait([quiet], timeout=0.05)
            if quiet.done():
                stage.pool[:] = 0xEE
            early = quiet.done()
        await _in_time(quiet)
        if not early:
            stage.pool[:] = 0xEE
        await writer.abort()
        await asyncio.sleep(0.02)
        require(bool((stage.pool == 0xEE).all()), "a write landed after quiesce")


async def quiesce_ends_when_the_sender_is_gone(make: MakePair) -> None:
    """A sender that closes in the middle of a handoff keeps no blocks in quarantine."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, TOKENS))
        await stage.sender.close()
        stage.receiver.withdraw(stage.landing.id)
        await _in_time(stage.receiver.quiesce(stage.landing.id))
        stage.pool[:] = 0xEE
        await writer.abort()
        await asyncio.sleep(0.02)
        require(bool((stage.pool == 0xEE).all()), "a write landed after quiesce")


async def the_loss_of_a_peer_is_told_once(make: MakePair) -> None:
    """A receiver that closes is told to the sender's owner, so that they can meet again."""
    async with make(TARGET) as pair:
        told: list[Endpoint] = []
        pair.sender.lost = lambda endpoint, _: told.append(endpoint)
        endpoint = pair.receiver.endpoint
        await pair.sender.connect(endpoint, SOURCE, TARGET)
        await pair.sender.connect(endpoint, SOURCE, TARGET)
        probe = await pair.sender.probe(endpoint)
        require(min(probe.bytes_per_second, probe.round_trip_seconds) >= 0, f"measured {probe}")
        require(not told, "a loss was told of a connection that stands")
        await pair.receiver.close()
        await eventually(lambda: bool(told), "nobody was told")
        await pair.sender.close()
        require(told == [endpoint], f"what was told is {told}")
        await refused(pair.sender.connect(endpoint, SOURCE, TARGET), PeerLost)


async def _in_time(quiescing: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await quiescing
    except TimeoutError as error:
        raise BrokenPromise("quiesce did not return") from error


async def _finish(stage: Stage, writer: Writer) -> None:
    await stage.write_all(writer)
    await writer.commit(b"", PATIENCE_SECONDS)
