"""A prefill worker that does not say that it has stopped writing gets no more of the pool."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from backends.api import Sampling
from backends.emulation.synthetic import SyntheticBackend
from backends.errors import PoolExhausted
from backends.host import HostConfig
from backends.host.janitor import Janitor
from backends.host.landings import Landings
from backends.host.ledger import Ledger
from backends.host.reuse import Reuse
from backends.host.work import Held
from backends.protocol import Link, RequestSpec, SequenceSpec, ToWorker
from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import Arrival
from transfer.layout import Endpoint

BLOCKS = 32


class Deaf:
    """A receiver whose landings are quiet when the test says so."""

    def __init__(self, transport: str) -> None:
        self.endpoint = Endpoint(transport, "x")
        self.quiet = asyncio.Event()
        self.expected: list[str] = []
        self.withdrawn: list[str] = []
        self._arrived: dict[str, Any] = {}

    def expect(self, landing: Any, pool: Any, *, arrived: Any, **_: Any) -> None:
        self.expected.append(landing.id)
        self._arrived[landing.id] = arrived

    def arrive(self, landing: Any) -> None:
        self._arrived[landing.id](Arrival(landing.id, landing.epoch, b"", 0.0, 0))

    def withdraw(self, landing_id: str) -> None:
        self.withdrawn.append(landing_id)

    async def quiesce(self, _: str) -> None:
        await self.quiet.wait()


class Desk:
    """The landings of one worker, and how often it had news of its load."""

    def __init__(self, janitor: Janitor) -> None:
        info = SyntheticBackend(pool_tokens=16 * BLOCKS).info
        config = HostConfig(id="d", role="decode", listen="", quarantine_share=0.25)
        self.ledger = Ledger(BLOCKS)
        reuse = Reuse("off", info, None, self.ledger, lambda: None)
        self.shm, self.tcp = Deaf("shm"), Deaf("tcp")
        self.news = self.freed = 0
        self._handle = 0
        self.landings = Landings(
            config, info, None, self.ledger, reuse, janitor, time.time_ns(),
            admit=lambda *_: None, failed=lambda *_: None, freed=self._room, shunned=self._told,
        )  # fmt: skip
        self.landings.receivers = [self.shm, self.tcp]  # type: ignore[list-item]
        self._link = Link(ToWorker, lambda *_: None, lambda *_: None)

    def _told(self) -> None:
        self.news += 1

    def _room(self) -> None:
        self.freed += 1

    def reserve(self, blocks: int, prefill: str = "p", transport: str = "") -> Any:
        self._handle += 1
        spec = RequestSpec(
            handle=self._handle,
            request="r",
            prompt=[1] * (16 * blocks),
            sequences=(SequenceSpec(index=0, seed=1),),
            sampling=Sampling(),
            max_tokens=1,
            deadline_seconds=9,
        )
        return self.landings.reserve(
            Held(self._link, spec.handle, str(spec.handle)),
            spec,
            prefill=prefill,
            transport=transport,
        )

    def withdraw(self, reserved: Any) -> None:
        self.landings.withdraw(reserved.landing.id)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    janitor = Janitor()
    running = asyncio.ensure_future(janitor.run())
    yield Desk(janitor)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_landing_is_expected_over_what_the_pair_agreed_on_and_nothing_else(
    desk: Desk,
) -> None:
    landing = desk.reserve(1, transport="shm").landing
    assert [it.transport for it in landing.endpoints] == ["shm"]
    assert (desk.shm.expected, desk.tcp.expected) == ([landing.id], [])
    desk.landings.withdraw(landing.id)
    assert (desk.shm.withdrawn, desk.tcp.withdrawn) == ([landing.id], [])
    with pytest.raises(PoolExhausted, match="over pigeon"):
        desk.reserve(1, transport="pigeon")
    assert len(desk.reserve(1).landing.endpoints) == 2


async def test_too_much_in_quarantine_shuts_out_its_cause_and_nobody_else(desk: Desk) -> None:
    first, second = desk.reserve(5, transport="shm"), desk.reserve(3, transport="shm")
    assert (desk.landings.shunned, desk.news) == ((), 0)  # a healthy one may use all it may
    desk.withdraw(first)
    assert (desk.landings.shunned, desk.news) == (("p",), 1)
    desk.withdraw(second)
    assert (desk.landings.shunned, desk.news) == (("p",), 1)
    with pytest.raises(PoolExhausted, match="p may write to 8 blocks"):
        desk.reserve(1)
    assert desk.reserve(1, prefill="another", transport="tcp")
    held = {who: count for why, who, count in desk.ledger.holders() if why == "quarantine"}
    assert held == {f"{first.landing.id} from p": 5, f"{second.landing.id} from p": 3}
    assert not desk.ledger.audit()

    desk.shm.quiet.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while desk.landings.shunned:
            await asyncio.sleep(0.005)
    assert desk.news == 2
    assert desk.reserve(1, transport="shm")
    assert not desk.ledger.audit()


async def test_no_more_can_come_into_quarantine_than_may_be_there(desk: Desk) -> None:
    """A worker that stops takes with it what it was given, not what was withdrawn before."""
    given = [desk.reserve(4, transport="shm"), desk.reserve(3, transport="shm")]
    with pytest.raises(PoolExhausted, match="p may write to 7 blocks"):
        desk.reserve(2, transport="shm")
    desk.reserve(2, prefill="another", transport="shm")
    given.append(desk.reserve(1, transport="shm"))
    for reserved in given:
        desk.withdraw(reserved)
    assert desk.ledger.held_for("quarantine") == 8
    assert desk.landings.shunned == ("p",)


async def test_what_has_arrived_can_be_written_to_no_more_and_counts_no_more(desk: Desk) -> None:
    first = desk.reserve(8, transport="shm")
    desk.shm.arrive(first.landing)
    assert desk.reserve(8, transport="shm")
    assert (desk.landings.shunned, desk.news) == ((), 0)


async def test_a_prefix_that_is_longer_than_one_may_hold_comes_alone(desk: Desk) -> None:
    desk.reserve(1, transport="shm", prefill="another")
    long = desk.reserve(12, transport="shm")
    with pytest.raises(PoolExhausted, match="p may write to 12 blocks"):
        desk.reserve(1, transport="shm")
    desk.shm.arrive(long.landing)
    desk.reserve(1, transport="shm")
    with pytest.raises(PoolExhausted, match="p may write to 1 blocks"):
        desk.reserve(12, transport="shm")


async def test_whoever_waits_for_memory_hears_of_the_headroom_at_once(desk: Desk) -> None:
    """What the sequences were to grow into is free, though the rest may be held for long."""
    reserved = desk.reserve(4, transport="shm")
    free = desk.ledger.free
    desk.withdraw(reserved)
    assert (desk.ledger.free, desk.freed) == (free + 1, 1)
    desk.shm.quiet.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while desk.freed < 2:
            await asyncio.sleep(0.005)
