"""What becomes of handoffs when the process at one of their ends has no memory left."""

import asyncio
import contextlib

import pytest
from ends import TRANSPORTS, receiver_of, sender_of
from far import BLOCKS, LAYOUT, POOL_BYTES, TOKENS, source
from far_desk import STALL_SECONDS, Owner, arrived, far, finish, hand_over

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import whole
from transfer.errors import PeerLost
from transfer.shared_memory import allocate

SLACK_BYTES = 1 << 20
"""What a starved process can still get: room for messages, not for the threads of a session."""

NEWCOMERS = 8


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


@pytest.fixture
async def owner(transport):
    pool = allocate(POOL_BYTES)
    async with receiver_of(
        transport, LAYOUT, BLOCKS, pool, stall_seconds=STALL_SECONDS
    ) as receiver:
        yield Owner(receiver, pool)


async def test_a_sender_without_memory_fails_its_handoff_and_no_later_one(owner, transport):
    async with far(transport) as sender:
        _, words = owner.expect()
        await sender.starve(SLACK_BYTES)
        sender.say("hand", words)
        assert await sender.hear() in ("MemoryError", "PeerLost", "RuntimeError")
        sender.say("feed")
        _, words = owner.expect()
        sender.say("hand", words)
        assert await sender.hear() == "landed"
        assert arrived(owner)


async def test_a_receiver_without_memory_loses_newcomers_and_serves_whom_it_knows(transport):
    async with contextlib.AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(far(transport))
        near, *others = [
            await stack.enter_async_context(sender_of(transport, stall_seconds=STALL_SECONDS))
            for _ in range(1 + NEWCOMERS)
        ]
        await hand_over(near, await receiver.expect())
        writer = await near.open(await receiver.expect(), source())
        await writer.write(whole(LAYOUT.layers, TOKENS)[0])
        newcomers = [(it, await receiver.expect()) for it in others]
        await receiver.starve(SLACK_BYTES)
        async with asyncio.timeout(PATIENCE_SECONDS):
            ends = await asyncio.gather(
                *(hand_over(*newcomer) for newcomer in newcomers), return_exceptions=True
            )
            await finish(writer)
        assert PeerLost in {type(end) for end in ends} <= {PeerLost, type(None)}
        receiver.say("feed")
        await hand_over(others[0], await receiver.expect())
