"""Requests that could leave a worker stuck, unbalanced or dead."""

import asyncio
import socket
import threading
from typing import Any

import msgspec
import pytest

from backends.api import Output, Row, Sampled
from backends.emulation.synthetic import SyntheticBackend
from backends.protocol import (
    Cancel,
    Failed,
    FirstToken,
    Granted,
    Meet,
    Met,
    Prefill,
    Refused,
    RequestSpec,
    Reserve,
    SequenceSpec,
    Tokens,
)
from tests.host.test_control import SHAPE, site, spec
from tests.support.patience import PATIENCE_SECONDS
from transfer.layout import Endpoint


def of(*sequences: SequenceSpec, handle: int = 1) -> RequestSpec:
    return msgspec.structs.replace(spec([1] * 40, handle=handle), sequences=sequences)


async def test_a_prompt_larger_than_the_pool_is_refused_and_holds_nobody_up() -> None:
    async for it in site():
        peer = await (await it.peer()).greet()
        peer.send(Prefill(spec=spec([1] * 600, handle=1), decode_here=True))
        peer.send(Prefill(spec=spec([1] * 40, handle=2), decode_here=True))
        refused: Refused = await peer.hear(Refused)
        assert (refused.handle, refused.kind) == (1, "invalid")
        assert "blocks" in refused.detail
        assert (await peer.hear(FirstToken)).handle == 2


async def test_a_prefill_that_waits_for_a_landings_blocks_begins_when_they_are_free() -> None:
    async for it in site():
        peer = await (await it.peer()).greet()
        peer.send(Reserve(spec=spec([1] * 480, handle=1)))
        await peer.hear(Granted)
        peer.send(Prefill(spec=spec([1] * 40, handle=2, max_tokens=1), decode_here=True))
        await asyncio.sleep(0.05)
        peer.send(Cancel(handle=1))
        assert (await peer.hear(FirstToken)).handle == 2
        assert await peer.free() == 32


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (of(SequenceSpec(index=0, seed=1), SequenceSpec(index=0, seed=2)), "sequences"),
        (of(SequenceSpec(index=0, seed=1, generated=[10**6])), "token ids"),
        (of(SequenceSpec(index=0, seed=1), handle=7), "handle"),
    ],
)
async def test_what_would_unbalance_the_books_is_refused(wrong: RequestSpec, reason: str) -> None:
    # So slow that it is not over by itself while that is waited for.
    async for it in site(SyntheticBackend(**SHAPE, step_seconds=0.2)):
        peer = await (await it.peer()).greet()
        peer.send(Prefill(spec=spec([1] * 40, handle=7, max_tokens=4000), decode_here=True))
        await peer.hear(Tokens)
        for message in (Prefill(spec=wrong, decode_here=True), Reserve(spec=wrong)):
            peer.send(message)
            refused: Refused = await peer.hear(Refused)
            assert refused.kind == "invalid"
            assert reason in refused.detail
        peer.send(Cancel(handle=7))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await peer.free() != 32:
                await asyncio.sleep(0.005)


class Careless(SyntheticBackend):
    """Breaks the contract in one step, in the way it is told."""

    answer: Any = None

    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        if self.answer is None:
            return super().step(batch, ready)
        answer, self.answer = self.answer, None
        return answer(batch)


@pytest.mark.parametrize(
    "answer",
    [
        lambda batch: [Output() for _ in batch],
        lambda batch: [Output((Sampled(1), Sampled(2))) for _ in batch],
        lambda batch: "",
        lambda batch: 3,
        lambda batch: [None for _ in batch],
    ],
)
async def test_a_backend_that_breaks_its_contract_loses_that_batch_and_no_more(answer: Any) -> None:
    backend = Careless(**SHAPE)
    async for it in site(backend):
        peer = await (await it.peer()).greet()
        backend.answer = answer
        peer.send(Prefill(spec=spec([1] * 40, handle=1), decode_here=True))
        failed: Failed = await peer.hear(Failed)
        assert (failed.code, failed.retry) == ("step_failed", True)
        peer.send(Prefill(spec=spec([1] * 40, handle=2), decode_here=True))
        assert (await peer.hear(FirstToken)).handle == 2


class Noting(SyntheticBackend):
    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        self.chunks = [*getattr(self, "chunks", []), *((r.start, len(r.tokens)) for r in batch)]
        return super().step(batch, ready)


async def test_no_chunk_of_a_prompt_looks_like_a_decode_row() -> None:
    backend = Noting(**SHAPE)
    async for it in site(backend, step_tokens=33):
        peer = await (await it.peer()).greet()
        for handle in (1, 2):
            peer.send(Prefill(spec=spec([1] * 32, handle=handle, max_tokens=1)))
        for _ in range(2):
            await peer.hear(FirstToken)
        assert backend.chunks == [(0, 32), (0, 32)]


async def test_a_peer_that_never_answers_is_met_once_at_a_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = Endpoint(transport="tcp", address=f"127.0.0.1:{deaf.getsockname()[1]}")
        async for it in site():
            peer = await (await it.peer()).greet()
            layout = SyntheticBackend(**SHAPE).info.layout
            meet = Meet(worker="deaf", incarnation=1, layout=layout, endpoints=(endpoint,))
            before = len(asyncio.all_tasks())
            for _ in range(50):
                peer.send(meet)
            assert await peer.free() == 32
            assert len(asyncio.all_tasks()) <= before + 3


async def test_a_sequence_that_fills_the_context_ends_there_and_spoils_no_batch() -> None:
    async for it in site(SyntheticBackend(**SHAPE, context_tokens=48)):
        peer = await (await it.peer()).greet()
        peer.send(Prefill(spec=spec([1] * 40, handle=1, max_tokens=500), decode_here=True))
        peer.send(Prefill(spec=spec([1] * 2, handle=2, max_tokens=40), decode_here=True))
        counts, ends = {1: 1, 2: 1}, dict[int, str]()
        while len(ends) < 2:
            message = await peer.hear(Tokens, Failed)
            assert isinstance(message, Tokens), message.detail
            for row in message.rows:
                counts[row.handle] += 1
                if row.finish:
                    ends[row.handle] = row.finish
        assert ends == {1: "length", 2: "length"}
        assert counts == {1: 9, 2: 40}


class Waiting(SyntheticBackend):
    """Computes nothing until it is let go."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.begun, self.go = threading.Event(), threading.Event()

    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        self.begun.set()
        assert self.go.wait(2 * PATIENCE_SECONDS)
        return super().step(batch, ready)


async def test_a_handoff_is_open_before_its_first_layer_is_computed() -> None:
    """So that a prefill which is called off meanwhile frees its landing long before the lease."""
    backend = Waiting(**SHAPE)
    async for decode in site(id="d", role="decode"):
        async for prefill in site(backend, id="p", role="prefill"):
            there, here = await (await decode.peer()).greet(), await (await prefill.peer()).greet()
            of = there.welcome
            here.send(Meet("d", of.incarnation, of.info.layout, of.endpoints))
            assert not (await here.hear(Met)).refusal
            there.send(Reserve(spec=spec([1] * 40)))
            granted: Granted = await there.hear(Granted)
            here.send(Prefill(spec=spec([1] * 40), landing=granted.landing))
            assert await asyncio.to_thread(backend.begun.wait, PATIENCE_SECONDS)
            here.send(Cancel(handle=1))
            failed: Failed = await there.hear(Failed)
            backend.go.set()
            assert (failed.code, failed.phase) == ("LandingGone", "handoff")
            assert await there.free() == 32
