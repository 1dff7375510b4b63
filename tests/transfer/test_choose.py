import asyncio
import contextlib

import msgspec
import pytest

from tests.support.patience import PATIENCE_SECONDS
from transfer import choose as module
from transfer.choose import Choice, Chooser, Peer, Tried, choose
from transfer.contract import Probe, nobody_cares
from transfer.errors import LandingGone, LayoutMismatch, PeerLost
from transfer.layout import Endpoint
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender
from transfer.stage import SOURCE, TARGET, Pair, Stage
from transfer.tcp import TcpReceiver, TcpSender

SHM = Endpoint("shm", "here")
TCP = Endpoint("tcp", "there:1")
PEER = Peer("decode", 7)


class Plain:
    """A sender that connects and measures what it was told to."""

    def __init__(self, probe=None, refusal=None):
        self.answer = probe or Probe(1e9, 1e-4)
        self.refusal = refusal
        self.lost = nobody_cares
        self.connected = 0
        self.opened = []

    async def connect(self, endpoint, source, target):
        self.connected += 1
        await asyncio.sleep(0)
        if self.refusal:
            raise self.refusal
        return "copy as it is"

    async def probe(self, endpoint):
        await asyncio.sleep(0)
        return self.answer

    async def open(self, landing, source):
        self.opened.append(landing)

    async def close(self):
        pass


class Slow(Plain):
    async def probe(self, endpoint):
        await asyncio.sleep(3600)


def chooser(losses=None, **senders):
    told = [] if losses is None else losses
    return Chooser(senders, lambda peer, reason: told.append((peer, str(reason))))


async def meet(chooser, *endpoints, peer=PEER):
    return await chooser.meet(peer, endpoints or (TCP, SHM), [SOURCE], [TARGET])


async def test_the_fastest_wins_and_says_so():
    fast, slow = Plain(Probe(9.84e9, 1e-3)), Plain(Probe(712e6, 1e-5))
    choice = await meet(chooser(shm=fast, tcp=slow))
    assert choice == Choice(SHM, "copy as it is", "shm 9.8 GB/s, tcp 712 MB/s; same host")
    choice = await meet(chooser(shm=slow, tcp=fast))
    assert (choice.endpoint, choice.reason) == (TCP, "tcp 9.8 GB/s, shm 712 MB/s; same host")


def test_without_a_rate_the_round_trip_decides():
    tried = [
        Tried(TCP, "", Probe(0, 2e-3)),
        Tried(Endpoint("nixl", "x"), "", Probe(0, 1e-3)),
    ]
    choice = choose("decode", tried)
    assert choice.endpoint.transport == "nixl"
    assert choice.reason == "nixl 1.00 ms there and back, tcp 2.00 ms there and back"
    tried.append(Tried(SHM, "", Probe(1e6, 1.0)))
    assert choose("decode", tried).endpoint == SHM


async def test_what_cannot_be_reached_is_passed_over_with_its_reason():
    refused = Plain(refusal=PeerLost("it is on another host"))
    choice = await meet(chooser(shm=refused, tcp=Plain()))
    assert choice.endpoint == TCP
    assert choice.reason == "tcp 1.0 GB/s; shm refused: it is on another host"


async def test_when_nothing_can_be_reached_every_reason_is_told():
    both = {name: Plain(refusal=PeerLost(f"no {name}")) for name in ("shm", "tcp")}
    with pytest.raises(PeerLost, match=r"^tcp: no tcp; shm: no shm$"):
        await meet(chooser(**both))
    with pytest.raises(PeerLost, match="offers no transport"):
        await meet(chooser(nixl=Plain()))
    both["tcp"].refusal = LayoutMismatch("layers: 3, 4")
    with pytest.raises(LayoutMismatch, match="layers"):
        await meet(chooser(**both))


def test_what_codes_ask_for_does_not_hide_why_numbers_cannot_travel():
    coded = Tried(Endpoint("tcp+int8", "x"), "", refusal=LayoutMismatch("unlike weights"))
    plain = Tried(TCP, "", refusal=PeerLost("no tcp"))
    with pytest.raises(PeerLost, match=r"^tcp\+int8: unlike weights; tcp: no tcp$"):
        choose("decode", [coded, plain])


async def test_a_measurement_that_does_not_end_is_a_refusal(monkeypatch):
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.01)
    choice = await meet(chooser(shm=Slow(), tcp=Plain()))
    assert choice.endpoint == TCP
    assert "shm refused: no measurement within" in choice.reason


async def test_two_who_ask_at_once_get_one_choice_and_one_attempt():
    senders = {"shm": Plain(), "tcp": Plain()}
    all_in_one = chooser(**senders)
    first, second = await asyncio.gather(meet(all_in_one), meet(all_in_one))
    assert first is second is await meet(all_in_one)
    assert [it.connected for it in senders.values()] == [1, 1]
    await meet(all_in_one, peer=Peer("decode", 8))
    assert [it.connected for it in senders.values()] == [2, 2]


async def test_a_handoff_takes_what_was_chosen_and_nothing_else():
    losses = []
    shm, tcp = Plain(Probe(2e9)), Plain(Probe(1e9))
    both = chooser(losses, shm=shm, tcp=tcp)
    landing = _landing()
    with pytest.raises(PeerLost, match="has not been met"):
        await both.open(landing, None)
    await meet(both)
    await both.open(landing, None)
    assert (shm.opened, tcp.opened) == ([landing], [])
    with pytest.raises(PeerLost, match="has not been met"):  # another start of that worker
        await both.open(msgspec.structs.replace(landing, epoch=type(landing.epoch)(8, 1)), None)
    tcp.lost(TCP, PeerLost("cut"))
    assert losses == []
    shm.lost(SHM, PeerLost("cut"))
    assert losses == [(PEER, "cut")]
    with pytest.raises(PeerLost, match="lost again"):
        await both.open(landing, None)
    shm.refusal = PeerLost("gone")
    assert (await meet(both)).endpoint == TCP
    await both.open(landing, None)
    assert tcp.opened == [landing]


async def test_a_connection_that_is_lost_while_they_meet_is_not_chosen():
    shm, tcp = Plain(Probe(2e9)), Plain(Probe(1e9))

    async def measured_then_lost(endpoint):
        shm.lost(endpoint, PeerLost("cut"))
        return Probe(2e9)

    shm.probe = measured_then_lost
    choice = await meet(chooser(shm=shm, tcp=tcp))
    assert (choice.endpoint, choice.reason) == (TCP, "tcp 1.0 GB/s; shm refused: cut")


async def test_a_failure_is_forgotten_and_the_next_meeting_tries_again():
    shm = Plain(refusal=PeerLost("not yet"))
    one = chooser(shm=shm)
    with pytest.raises(PeerLost):
        await meet(one)
    shm.refusal = None
    assert (await meet(one)).endpoint == SHM


async def test_real_transports_are_tried_and_one_carries_the_handoff():
    network = MemoryNetwork()
    async with contextlib.AsyncExitStack() as stack:
        near = await stack.enter_async_context(MemoryReceiver(network, TARGET))
        far = await stack.enter_async_context(TcpReceiver(TARGET))
        losses = []
        both = chooser(losses, memory=MemorySender(network), tcp=TcpSender())
        stack.push_async_callback(both.close)
        choice = await meet(both, near.endpoint, far.endpoint)
        receiver = {"memory": near, "tcp": far}[choice.endpoint.transport]
        stage = Stage(Pair(both, receiver))
        await stage.hand_over()
        assert len(stage.arrivals) == 1
        await receiver.close()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not losses:
                await asyncio.sleep(0.01)
        with pytest.raises((PeerLost, LandingGone)):
            await both.open(stage.landing, stage.source)


def _landing():
    network = MemoryNetwork()
    return Stage(Pair(MemorySender(network), MemoryReceiver(network, TARGET))).landing
