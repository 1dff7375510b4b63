import asyncio

import pytest

from tests.support.patience import PATIENCE_SECONDS
from transfer.errors import DigestMismatch, PeerLost
from transfer.faults import FaultySender, faults
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender
from transfer.stage import TARGET, Pair, Stage
from transfer.tcp import TcpReceiver, TcpSender


@pytest.fixture(params=["memory", "tcp"])
async def make(request):
    """Both ends of a transport whose sender is damaged as the argument says."""
    if request.param == "memory":
        network = MemoryNetwork()
        receiver, sender = MemoryReceiver(network, TARGET), MemorySender(network)
    else:
        receiver, sender = TcpReceiver(TARGET), TcpSender()
    async with receiver, sender:
        yield lambda what: Pair(FaultySender(sender, what), receiver)


@pytest.mark.parametrize("kind", ["flip_bit", "missing_page", "swapped_layer"])
async def test_the_digest_catches_damage_and_the_next_handoff_succeeds(make, kind):
    pair = make(f"{kind}@1")
    first = Stage(pair, 1)
    with pytest.raises(DigestMismatch):
        await first.hand_over()
    assert [type(it) for it in first.failures] == [DigestMismatch]
    assert not first.arrivals
    second = Stage(pair, 2)
    await second.hand_over()
    assert (second.pool == second.wanted()).all()


async def test_a_connection_dropped_at_the_second_write_loses_the_peer(make):
    pair = make("drop@1:2")
    first = Stage(pair, 1)
    with pytest.raises(PeerLost):
        await first.hand_over()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await first.told.wait()
    assert [type(it) for it in first.failures] == [PeerLost]
    await Stage(pair, 2).hand_over()


async def test_a_delay_changes_nothing_but_the_time(make):
    pair = make("delay@*:0.001")
    stage = Stage(pair)
    await stage.hand_over()
    assert (stage.pool == stage.wanted()).all()


async def test_only_the_handoff_that_was_named_is_damaged(make):
    pair = make("flip_bit@2")
    await Stage(pair, 1).hand_over()
    with pytest.raises(DigestMismatch):
        await Stage(pair, 2).hand_over()
    await Stage(pair, 3).hand_over()


@pytest.mark.parametrize("text", ["flip_bit", "flip_bit@0", "flipbit@1", "delay@1:", "@1"])
def test_a_fault_that_is_none_is_refused_by_its_text(text):
    with pytest.raises(ValueError, match=text.replace("*", r"\*")):
        faults(f"drop@3:2, {text}")
