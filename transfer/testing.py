"""The promises of a transport, each as a function that checks it. Needs no test framework.

    pair = contextlib.asynccontextmanager(...)  # layout -> Pair(sender, receiver)
    await check_transport(pair)

Every promise gets a fresh pair whose receiver has the layout that it is called with. A broken
promise raises `BrokenPromise`, which says what was found; `PROMISES` lists them all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import numpy as np

from transfer.contract import TOUCH_SECONDS, Arrival, KVSlice, Writer
from transfer.errors import DigestMismatch, LandingGone, PeerLost
from transfer.layout import Endpoint, Epoch, Landing
from transfer.reuse import (
    a_writer_that_sends_all_is_refused,
    damage_to_what_is_present_is_caught,
    what_is_present_is_not_sent,
)
from transfer.stage import (
    PATIENCE_SECONDS,
    SOURCE,
    TARGET,
    TARGET_BLOCKS,
    TOKENS,
    BrokenPromise,
    MakePair,
    Pair,
    Stage,
    eventually,
    refused,
    require,
)

__all__ = ["PROMISES", "BrokenPromise", "MakePair", "Pair", "check_transport"]

# ---- the promises ----------------------------------------------------------------------------


async def a_handoff_arrives_bit_for_bit(make: MakePair) -> None:
    """What is committed lies in the landing's blocks, and nothing else has changed."""
    async with _stage(make) as stage:
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
    async with _stage(make) as stage:
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


async def landing_is_used_once(make: MakePair) -> None:
    """After a commit the same landing is refused."""
    async with _stage(make) as stage:
        await stage.hand_over()
        await refused(stage.hand_over(), LandingGone)
        require(len(stage.arrivals) == 1, "the owner was told twice")


async def a_claim_is_told_before_the_first_write(make: MakePair) -> None:
    """`claimed` is called once, and for nobody who was refused."""
    async with _stage(make) as stage:
        wrong = msgspec.structs.replace(stage.landing, secret=b"x" * 16)
        await refused(stage.hand_over(wrong), LandingGone)
        require(not stage.claims, "somebody without the secret was announced")
        await stage.hand_over()
        require(stage.claims == [0], f"after these many writes it was told: {stage.claims}")


async def landing_has_one_writer(make: MakePair) -> None:
    """A second writer is refused while the first one writes, and does not disturb it."""
    async with _stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, 10))
        await refused(stage.hand_over(), LandingGone)
        require(not stage.failures, "the first writer was disturbed")
        await writer.abort()


async def wrong_epoch_is_refused(make: MakePair) -> None:
    """A writer with an older or newer epoch writes nothing."""
    async with _stage(make) as stage:
        for epoch in (Epoch(7, 0), Epoch(6, 1), Epoch(8, 1)):
            await _refused_unharmed(stage, msgspec.structs.replace(stage.landing, epoch=epoch))
        await stage.hand_over()


async def wrong_secret_is_refused(make: MakePair) -> None:
    """A writer that does not know the landing's secret writes nothing."""
    async with _stage(make) as stage:
        for secret in (b"", b"x" * 16, stage.landing.secret[:-1]):
            await _refused_unharmed(stage, msgspec.structs.replace(stage.landing, secret=secret))
        await stage.hand_over()


async def unknown_landing_is_refused(make: MakePair) -> None:
    """A landing that nobody expects is not written to."""
    async with _stage(make) as stage:
        await _refused_unharmed(stage, msgspec.structs.replace(stage.landing, id="promise-99"))


async def write_outside_the_landing_is_refused(make: MakePair) -> None:
    """A writer that names blocks of somebody else changes none of them."""
    async with _stage(make) as stage:
        foreign = msgspec.structs.replace(stage.landing, blocks=(9, 2, 3, 5, 14, 0))
        await refused(stage.hand_over(foreign))
        block = TARGET.block_bytes
        theirs = slice(5 * block, 6 * block)
        unharmed = bool((stage.pool[theirs] == stage.before[theirs]).all())
        require(unharmed, "a block outside the landing was written to")
        require(not stage.arrivals, "it was even committed")


async def digest_catches_a_flipped_bit(make: MakePair) -> None:
    """One bit that changed in the pool after the writes refuses the handoff."""
    async with _stage(make) as stage:

        def flip() -> None:
            stage.pool[2 * TARGET.block_bytes + 5] ^= 0x01

        await _caught(stage, flip)


async def digest_catches_a_stale_page(make: MakePair) -> None:
    """A block that still holds what was there before refuses the handoff."""
    async with _stage(make) as stage:
        block = slice(3 * TARGET.block_bytes, 4 * TARGET.block_bytes)

        def restore() -> None:
            stage.pool[block] = stage.before[block]

        await _caught(stage, restore)


async def digest_catches_swapped_layers(make: MakePair) -> None:
    """Two layers in each other's place refuse the handoff."""
    async with _stage(make) as stage:
        await _caught(stage, lambda: _swap(stage, "layer"))


async def digest_catches_k_in_place_of_v(make: MakePair) -> None:
    """K and V in each other's place refuse the handoff."""
    async with _stage(make) as stage:
        await _caught(stage, lambda: _swap(stage, "kv"))


async def digest_catches_swapped_tokens(make: MakePair) -> None:
    """Two tokens in each other's place refuse the handoff."""
    async with _stage(make) as stage:
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
    async with _stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        for layer in range(SOURCE.layers - 1):
            await writer.write(KVSlice(layer, 0, TOKENS))
        await refused(writer.commit(b"", PATIENCE_SECONDS), DigestMismatch)
        await writer.abort()
        require(len(stage.failures) == 1, f"the owner was told {stage.failures}")


async def abort_frees_the_landing(make: MakePair) -> None:
    """An abort tells the owner, once, and nothing is accepted after it."""
    async with _stage(make) as stage:
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
    async with _stage(make) as stage:
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
    async with _stage(make) as stage:
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
    async with _stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, TOKENS))
        await stage.sender.close()
        stage.receiver.withdraw(stage.landing.id)
        await _in_time(stage.receiver.quiesce(stage.landing.id))
        stage.pool[:] = 0xEE
        await writer.abort()
        await asyncio.sleep(0.02)
        require(bool((stage.pool == 0xEE).all()), "a write landed after quiesce")


async def an_id_may_be_expected_again(make: MakePair) -> None:
    """A landing that was withdrawn can be given anew under a later epoch; the old is refused."""
    async with _stage(make) as stage:
        old = stage.landing
        stage.receiver.withdraw(old.id)
        await stage.receiver.quiesce(old.id)
        stage.landing = msgspec.structs.replace(old, epoch=Epoch(7, 2), secret=b"n" * 16)
        stage.expect()
        await refused(stage.hand_over(old), LandingGone)
        await stage.hand_over()


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


PROMISES: tuple[Callable[[MakePair], Awaitable[None]], ...] = (
    a_handoff_arrives_bit_for_bit,
    a_write_renews_the_lease,
    many_handoffs_share_a_pair,
    landing_is_used_once,
    a_claim_is_told_before_the_first_write,
    landing_has_one_writer,
    wrong_epoch_is_refused,
    wrong_secret_is_refused,
    unknown_landing_is_refused,
    write_outside_the_landing_is_refused,
    digest_catches_a_flipped_bit,
    digest_catches_a_stale_page,
    digest_catches_swapped_layers,
    digest_catches_k_in_place_of_v,
    digest_catches_swapped_tokens,
    a_damaged_note_is_refused,
    a_slice_that_was_never_written_is_caught,
    abort_frees_the_landing,
    a_lost_sender_fails_its_landings,
    withdrawn_landing_is_refused,
    no_write_lands_after_quiesce,
    no_write_of_a_stalled_sender_lands_after_quiesce,
    quiesce_ends_when_the_sender_is_gone,
    an_id_may_be_expected_again,
    an_owner_may_decline,
    the_loss_of_a_peer_is_told_once,
    what_is_present_is_not_sent,
    damage_to_what_is_present_is_caught,
    a_writer_that_sends_all_is_refused,
)


async def check_transport(make_pair: MakePair) -> list[str]:
    """Check every promise in turn. Returns the names of those that hold, which is all of them.

    Raises:
        BrokenPromise: the first that does not hold, with its name.
    """
    kept = []
    for promise in PROMISES:
        name = getattr(promise, "__name__", repr(promise))
        try:
            await promise(make_pair)
        except BrokenPromise as error:
            raise BrokenPromise(f"{name}: {error}") from error
        kept.append(name)
    return kept


# ---- what the promises share -----------------------------------------------------------------


@contextlib.asynccontextmanager
async def _stage(make: MakePair) -> AsyncIterator[Stage]:
    async with make(TARGET) as pair:
        yield Stage(pair)


async def _in_time(quiescing: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await quiescing
    except TimeoutError as error:
        raise BrokenPromise("quiesce did not return") from error


async def _finish(stage: Stage, writer: Writer) -> None:
    await stage.write_all(writer)
    await writer.commit(b"", PATIENCE_SECONDS)


async def _refused_unharmed(stage: Stage, landing: Landing) -> None:
    """`landing` is refused, changes nothing, and the owner of the true one hears nothing."""
    await refused(stage.hand_over(landing), LandingGone)
    require(bool((stage.pool == stage.before).all()), "it wrote something all the same")
    require(not stage.failures and not stage.arrivals, "the true landing was disturbed")


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
