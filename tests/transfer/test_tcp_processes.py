"""What becomes of a handoff when the process at its other end dies, stops, is cut off."""

import asyncio
import signal

import numpy as np
import pytest
from far import LAYOUT, POOL_BYTES, TOKENS, source
from far_desk import STALL_SECONDS, Owner, arrived, far, finish, hand_over

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import whole
from transfer.errors import PeerLost
from transfer.tcp import TcpReceiver, TcpSender


@pytest.fixture
async def owner():
    async with TcpReceiver(LAYOUT, stall_seconds=STALL_SECONDS) as receiver:
        yield Owner(receiver, np.zeros(POOL_BYTES, np.uint8))


@pytest.fixture
async def near():
    async with TcpSender(stall_seconds=STALL_SECONDS) as sender:
        yield sender


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.01, 0.03])
async def test_a_sender_that_is_killed_is_lost_at_once_and_quiet(owner, moment):
    async with far("tcp") as sender:
        landing, words = owner.expect()
        sender.say("loop", words)
        assert await sender.hear() == "round"
        await asyncio.sleep(moment)
        sender.signal(signal.SIGKILL)
        assert await owner.end() is PeerLost
        await owner.quiet(landing, STALL_SECONDS / 2)
    await asyncio.sleep(0.1)
    assert owner.is_unharmed()
    assert owner.ends.empty()


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.01, 0.03])
async def test_what_a_stopped_sender_still_has_to_say_reaches_no_later_owner(owner, moment):
    async with far("tcp") as sender:
        landing, words = owner.expect()
        sender.say("loop", words)
        assert await sender.hear() == "round"
        await asyncio.sleep(moment)
        sender.signal(signal.SIGSTOP)
        await owner.quiet(landing, STALL_SECONDS / 2)
        sender.signal(signal.SIGCONT)
        while (said := await sender.hear()) == "round":
            pass
        assert said in ("LandingGone", "PeerLost")
        assert owner.is_unharmed()
        assert owner.ends.empty()
        again, words = owner.expect()
        sender.say("hand", words)
        assert await sender.hear() == "landed"
        assert arrived(owner)
        assert again.id != landing.id


async def test_a_sender_that_stays_stopped_is_lost_when_it_was_silent_too_long(owner):
    async with far("tcp") as sender:
        _, words = owner.expect()
        sender.say("half", words)
        assert await sender.hear() == "half"
        sender.signal(signal.SIGSTOP)
        assert await owner.end() is PeerLost


@pytest.mark.parametrize("number", [0, 1], ids=["session", "data"])
async def test_a_connection_that_is_cut_fails_the_handoff_at_both_ends(owner, number):
    async with far("tcp") as sender:
        _, words = owner.expect()
        sender.say("half", words)
        assert await sender.hear() == "half"
        sender.say("cut", number)
        assert await owner.end() is PeerLost
        sender.say("rest")
        assert await sender.hear() == "PeerLost"
        _, words = owner.expect()
        sender.say("hand", words)
        assert await sender.hear() == "landed"
        assert arrived(owner)


async def test_a_receiver_that_is_killed_is_lost_at_once_and_others_are_served(owner, near):
    async with far("tcp") as receiver:
        writer = await near.open(await receiver.expect(), source())
        await writer.write(whole(LAYOUT.layers, TOKENS)[0])
        receiver.signal(signal.SIGKILL)
        async with asyncio.timeout(STALL_SECONDS / 2):
            with pytest.raises(PeerLost):
                await writer.commit(b"", PATIENCE_SECONDS)
            await writer.abort()
    landing, _ = owner.expect()
    await hand_over(near, landing)
    assert arrived(owner)


async def test_a_receiver_that_is_stopped_is_lost_in_time_and_hears_of_it_later(near):
    async with far("tcp") as receiver:
        landing = await receiver.expect()
        writer = await near.open(landing, source())
        await writer.write(whole(LAYOUT.layers, TOKENS)[0])
        assert await receiver.hear() == "claimed"  # or it may never hear of this writer
        receiver.signal(signal.SIGSTOP)
        async with asyncio.timeout(5 * STALL_SECONDS):
            with pytest.raises(PeerLost):
                await finish(writer)
            await writer.abort()
        receiver.signal(signal.SIGCONT)
        assert await receiver.hear() == "failed PeerLost"
        await hand_over(near, await receiver.expect())
        assert [await receiver.hear() for _ in range(2)] == ["claimed", "arrived"]
