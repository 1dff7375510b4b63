import asyncio
import contextlib
from functools import partial

import pytest
import uvloop

from transfer.digest import seal
from transfer.errors import KeptChanged
from transfer.landings import Landings
from transfer.layout import Epoch
from transfer.memory import MemoryNetwork, MemoryReceiver, MemorySender
from transfer.shared_memory import allocate
from transfer.shm import ShmReceiver, ShmSender
from transfer.stage import TARGET_BLOCKS, Gate, Pair, damaged_notes
from transfer.tcp import TcpReceiver, TcpSender
from transfer.testing import PROMISES, BrokenPromise, check_transport


@contextlib.asynccontextmanager
async def memory(layout):
    network = MemoryNetwork()
    async with MemoryReceiver(network, layout) as receiver, MemorySender(network) as sender:
        notes = partial(damaged_notes, sender)
        yield Pair(sender, receiver, network.stall, damage_notes=notes)


@contextlib.asynccontextmanager
async def tcp(layout):
    async with (
        TcpReceiver(layout, secret="between workers") as receiver,
        TcpSender(secret="between workers") as sender,
    ):
        gate = sender.tamper = Gate()
        notes = partial(damaged_notes, sender)
        yield Pair(sender, receiver, gate.closed, damage_notes=notes)
    assert len(asyncio.all_tasks()) == 1


@contextlib.asynccontextmanager
async def shm(layout):
    pool = allocate(TARGET_BLOCKS * layout.block_bytes)
    async with (
        ShmReceiver(layout, TARGET_BLOCKS, pool, secret="between workers") as receiver,
        ShmSender(secret="between workers") as sender,
    ):
        gate = sender.tamper = Gate()
        yield Pair(sender, receiver, gate.closed, pool, partial(damaged_notes, sender))
    assert len(asyncio.all_tasks()) == 1


@contextlib.asynccontextmanager
async def shm_in_one_copy(layout):
    """Nobody looks at the frames: they are never made."""
    async with shm(layout) as pair:
        pair.sender.tamper = None
        yield pair._replace(stall=None)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda it: it.__name__)
@pytest.mark.parametrize(
    "transport", [memory, tcp, shm, shm_in_one_copy], ids=lambda it: it.__name__
)
async def test_a_transport_keeps_every_promise(transport, promise):
    await promise(transport)


@pytest.mark.parametrize("transport", [tcp, shm], ids=lambda it: it.__name__)
def test_every_promise_is_kept_on_the_loop_that_production_uses(transport):
    assert uvloop.run(check_transport(transport)) == [it.__name__ for it in PROMISES]


class ForgetsWhatIsUnderWay(MemoryReceiver):
    async def quiesce(self, landing_id):
        pass


class CallsTwice(MemoryReceiver):
    def expect(self, landing, pool, *, arrived, **told):
        def twice(arrival):
            arrived(arrival)
            return arrived(arrival)

        super().expect(landing, pool, arrived=twice, **told)


class AnyEpochWillDo(MemoryReceiver):
    def __init__(self, network, layout):
        super().__init__(network, layout)
        self.landings = ForgivingBook(layout)


class ForgivingBook(Landings):
    def claim(self, landing_id, epoch, secret, writer):
        return super().claim(landing_id, Epoch(7, 1), secret, writer)


class TakesAnyNote(MemoryReceiver):
    def expect(self, landing, pool, **told):
        super().expect(landing, pool, **told)
        entry = self.landings._book[landing.id]
        settle = entry.settle
        entry.settle = lambda found, sent, sealed, note, seconds: settle(
            found, sent, seal(landing, sent, note), note, seconds
        )


class TrustsWhatItKept(MemoryReceiver):
    def expect(self, landing, pool, **told):
        super().expect(landing, pool, **told)
        entry = self.landings._book[landing.id]
        true = entry._mismatch

        def trusting(blocks, sent):
            found = true(blocks, sent)
            return None if isinstance(found, KeptChanged) else found

        entry._mismatch = trusting


@pytest.mark.parametrize(
    ("receiver", "promise"),
    [
        (ForgetsWhatIsUnderWay, "no_write_lands_after_quiesce"),
        (ForgetsWhatIsUnderWay, "no_write_of_a_stalled_sender_lands_after_quiesce"),
        (CallsTwice, "a_handoff_arrives_bit_for_bit"),
        (TrustsWhatItKept, "damage_to_what_is_present_is_caught"),
        (TakesAnyNote, "a_damaged_note_is_refused"),
        (AnyEpochWillDo, "wrong_epoch_is_refused"),
    ],
    ids=lambda it: getattr(it, "__name__", it),
)
async def test_the_kit_finds_a_transport_that_breaks_its_promise(receiver, promise):
    @contextlib.asynccontextmanager
    async def broken(layout):
        network = MemoryNetwork()
        async with receiver(network, layout) as there, MemorySender(network) as sender:
            notes = partial(damaged_notes, sender)
            yield Pair(sender, there, network.stall, damage_notes=notes)

    check = next(it for it in PROMISES if it.__name__ == promise)
    with pytest.raises(BrokenPromise):
        await check(broken)
