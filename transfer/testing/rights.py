"""Promises about who may write to a landing, and where."""

from __future__ import annotations

import msgspec

from transfer.contract import KVSlice
from transfer.errors import LandingGone
from transfer.layout import Epoch, Landing
from transfer.stage import TARGET, MakePair, Stage, on_stage, refused, require


async def landing_is_used_once(make: MakePair) -> None:
    """After a commit the same landing is refused."""
    async with on_stage(make) as stage:
        await stage.hand_over()
        await refused(stage.hand_over(), LandingGone)
        require(len(stage.arrivals) == 1, "the owner was told twice")


async def a_claim_is_told_before_the_first_write(make: MakePair) -> None:
    """`claimed` is called once, and for nobody who was refused."""
    async with on_stage(make) as stage:
        wrong = msgspec.structs.replace(stage.landing, secret=b"x" * 16)
        await refused(stage.hand_over(wrong), LandingGone)
        require(not stage.claims, "somebody without the secret was announced")
        await stage.hand_over()
        require(stage.claims == [0], f"after these many writes it was told: {stage.claims}")


async def landing_has_one_writer(make: MakePair) -> None:
    """A second writer is refused while the first one writes, and does not disturb it."""
    async with on_stage(make) as stage:
        writer = await stage.sender.open(stage.landing, stage.source)
        await writer.write(KVSlice(0, 0, 10))
        await refused(stage.hand_over(), LandingGone)
        require(not stage.failures, "the first writer was disturbed")
        await writer.abort()


async def wrong_epoch_is_refused(make: MakePair) -> None:
    """A writer with an older or newer epoch writes nothing."""
    async with on_stage(make) as stage:
        for epoch in (Epoch(7, 0), Epoch(6, 1), Epoch(8, 1)):
            await _refused_unharmed(stage, msgspec.structs.replace(stage.landing, epoch=epoch))
        await stage.hand_over()


async def wrong_secret_is_refused(make: MakePair) -> None:
    """A writer that does not know the landing's secret writes nothing."""
    async with on_stage(make) as stage:
        for secret in (b"", b"x" * 16, stage.landing.secret[:-1]):
            await _refused_unharmed(stage, msgspec.structs.replace(stage.landing, secret=secret))
        await stage.hand_over()


async def unknown_landing_is_refused(make: MakePair) -> None:
    """A landing that nobody expects is not written to."""
    async with on_stage(make) as stage:
        await _refused_unharmed(stage, msgspec.structs.replace(stage.landing, id="promise-99"))


async def write_outside_the_landing_is_refused(make: MakePair) -> None:
    """A writer that names blocks of somebody else changes none of them."""
    async with on_stage(make) as stage:
        foreign = msgspec.structs.replace(stage.landing, blocks=(9, 2, 3, 5, 14, 0))
        await refused(stage.hand_over(foreign))
        block = TARGET.block_bytes
        theirs = slice(5 * block, 6 * block)
        unharmed = bool((stage.pool[theirs] == stage.before[theirs]).all())
        require(unharmed, "a block outside the landing was written to")
        require(not stage.arrivals, "it was even committed")


async def an_id_may_be_expected_again(make: MakePair) -> None:
    """A landing that was withdrawn can be given anew under a later epoch; the old is refused."""
    async with on_stage(make) as stage:
        old = stage.landing
        stage.receiver.withdraw(old.id)
        await stage.receiver.quiesce(old.id)
        stage.landing = msgspec.structs.replace(old, epoch=Epoch(7, 2), secret=b"n" * 16)
        stage.expect()
        await refused(stage.hand_over(old), LandingGone)
        await stage.hand_over()


async def _refused_unharmed(stage: Stage, landing: Landing) -> None:
    """`landing` is refused, changes nothing, and the owner of the true one hears nothing."""
    await refused(stage.hand_over(landing), LandingGone)
    require(bool((stage.pool == stage.before).all()), "it wrote something all the same")
    require(not stage.failures and not stage.arrivals, "the true landing was disturbed")
