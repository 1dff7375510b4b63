"""Whatever bytes arrive on a control connection, it is heard or ended, and no other one suffers."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.api import Sampling
from backends.errors import ProtocolError
from backends.host.handoff import decode_note, encode_note
from backends.protocol import (
    VERSION,
    Caller,
    Cancel,
    First,
    Flow,
    Hello,
    Inspect,
    Link,
    Meet,
    Message,
    Prefill,
    Proof,
    RequestSpec,
    Reserve,
    SequenceSpec,
    ToGateway,
    ToWorker,
    frame,
)
from tests.host.test_control import Site, site
from tests.support.garbage import DEEP, NO_UTF8, examples, garbage
from tests.support.patience import PATIENCE_SECONDS
from transfer.layout import Endpoint
from transfer.stage import TARGET

SPEC = RequestSpec(
    handle=1,
    request="r",
    prompt=[1, 2, 3],
    sequences=(SequenceSpec(index=0, seed=1),),
    sampling=Sampling(),
    max_tokens=2,
    deadline_seconds=1.0,
)
MESSAGES: list[Message] = [
    Caller("g", "").hello,
    Proof(mac=b"m" * 32),
    Meet(worker="w", incarnation=1, layout=TARGET, endpoints=(Endpoint("tcp", "127.0.0.1:1"),)),
    Reserve(spec=SPEC),
    Prefill(spec=SPEC, decode_here=True),
    Cancel(handle=1, indexes=(0,)),
    Flow(handle=1, index=0, paused=True),
    Inspect(ticket=1),
]
FRAMES = list(map(frame, MESSAGES))
DEEP_FRAME = struct.pack(">I", 4 + len(DEEP)) + b"\x82\xa1x" + DEEP + b"\x01"
NO_UTF8_FRAME = frame(Hello(version=VERSION, gateway="gggg")).replace(b"\xa4gggg", NO_UTF8)


@given(note=garbage([encode_note((First(index=0, token=5), First(1, 6, "stop")))]))
@example(note=b"\x91\x95\x00\x01\xc0\xc0" + DEEP)
@example(note=b"\x91\x93\x00\x01" + NO_UTF8)
def test_a_note_is_read_or_refused(note: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode_note(note), tuple)


class _Wire:
    """A transport that notes whether it was aborted."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


class _End:
    """A link, and what it has heard."""

    def __init__(self, accepts: Any) -> None:
        self.heard: list[Message] = []
        self.wire = _Wire()
        self.link = Link(accepts, lambda _, message: self.heard.append(message), lambda *_: None)
        self.link.connection_made(self.wire)


@pytest.mark.parametrize("accepts", [ToWorker, ToGateway])
@given(data=st.lists(garbage(FRAMES), max_size=4), cuts=st.lists(st.integers(1, 64), min_size=1))
@example(data=[DEEP_FRAME], cuts=[64])
@example(data=[NO_UTF8_FRAME], cuts=[1])
def test_a_link_hears_the_same_messages_however_they_arrive_or_ends(
    accepts: Any, data: list[bytes], cuts: list[int]
) -> None:
    stream, whole, parts = b"".join(data), _End(accepts), _End(accepts)
    whole.link.data_received(stream)
    at, number = 0, 0
    while at < len(stream):
        step = cuts[number % len(cuts)]
        parts.link.data_received(stream[at : at + step])
        at, number = at + step, number + 1
    assert parts.heard == whole.heard
    assert parts.wire.aborted == whole.wire.aborted
    assert all(isinstance(it, Message) for it in whole.heard)


@pytest.fixture
async def worker() -> AsyncIterator[Site]:
    async for it in site(lease_seconds=0.2):
        yield it


async def test_a_worker_survives_whatever_a_gateway_says(worker: Site) -> None:
    """Each stream of garbage follows a proper greeting; another gateway goes on undisturbed."""
    good = await (await worker.peer()).greet()
    seen = examples(st.lists(garbage(FRAMES), min_size=1, max_size=4), 150)
    for data in [*seen, [DEEP_FRAME]]:
        bad = await (await worker.peer()).greet()
        bad.writer.write(b"".join(data))
        bad.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert await bad.ended()
        bad.writer.close()
        assert await good.free() >= 0
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await good.free() != 32:
            await asyncio.sleep(0.01)
