"""A worker that computes again only what it has not kept."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from backends.api import Output, Row
from backends.chain import chain, mark, unpack
from backends.emulation.synthetic import SyntheticBackend
from backends.host.ledger import Ledger
from backends.host.reuse import Reuse
from backends.protocol import Cached, Cancel, Failed, FirstToken, Prefill, RequestSpec, Tokens
from tests.host.test_control import SHAPE, Peer, Site, site, spec
from tests.support.patience import PATIENCE_SECONDS

BLOCKS = 32
SIZE = 16
PROMPT = list(range(100, 180))  # five blocks


class Noting(SyntheticBackend):
    """Notes the chunks that it computes; fails a step when told to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**SHAPE, "verify_kv": True, **options})
        self.chunks: list[tuple[int, int]] = []
        self.fail = False

    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        self.chunks += [(row.start, len(row.tokens)) for row in batch if len(row.tokens) > 1]
        if self.fail:
            self.fail = False
            raise RuntimeError("the device fell over")
        return super().step(batch, ready)

    @property
    def bytes(self) -> np.ndarray:
        return np.frombuffer(self.pool, np.uint8)


class Worker:
    def __init__(self, where: Site, peer: Peer, backend: Noting) -> None:
        self.host, self.peer, self.backend = where.host, peer, backend
        self._handle = 0

    @property
    def reuse(self) -> Reuse:
        return self.host._requests.reuse

    def spec(self, prompt: list[int], salt: bytes = b"t", **more: Any) -> RequestSpec:
        self._handle += 1
        made = spec(prompt, handle=self._handle, **more)
        return msgspec.structs.replace(made, salt=salt)

    def begin(self, prompt: list[int], salt: bytes = b"t", **more: Any) -> int:
        made = self.spec(prompt, salt, **more)
        self.peer.send(Prefill(spec=made, decode_here=True))
        return made.handle

    async def say(
        self, prompt: list[int], salt: bytes = b"t", **more: Any
    ) -> tuple[int, list[int]]:
        """How many tokens were there already, and the text."""
        self.begin(prompt, salt, **more)
        first: FirstToken = await self.peer.hear(FirstToken)
        text, finish = [first.first[0].token], first.first[0].finish
        while finish is None:
            message = await self.peer.hear(Tokens, Failed)
            assert isinstance(message, Tokens), message.detail
            text.append(message.rows[0].token)
            finish = message.rows[0].finish
        await self.proven()
        return first.cached, text

    async def proven(self) -> None:
        """All that is kept may be shared."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(it.proof is None for it in self.reuse.prefixes._by_link.values()):
                await asyncio.sleep(0.001)


async def working(backend: Noting | None = None, **config: Any) -> AsyncIterator[Worker]:
    backend = backend or Noting()
    async for it in site(backend, **config):
        yield Worker(it, await (await it.peer()).greet(), backend)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async for it in working():
        yield it
        assert await it.peer.free() == BLOCKS


async def test_the_second_time_only_the_end_of_a_prompt_is_computed(worker: Worker) -> None:
    cold = await worker.say(PROMPT)
    worker.backend.chunks.clear()
    assert await worker.say(PROMPT) == (64, cold[1])
    assert worker.backend.chunks == [(64, 16)]
    longer = PROMPT + [7] * 30
    cached, text = await worker.say(longer)
    assert (cached, text) == (80, (await worker.say(longer, b"another"))[1])


async def test_generated_tokens_are_found_by_the_next_turn_of_a_chat(worker: Worker) -> None:
    _, text = await worker.say(PROMPT[:70], max_tokens=30)
    turn = [*PROMPT[:70], *text, 3, 4, 5]
    cached, _ = await worker.say(turn)
    assert cached == (70 + 30 - 1) // SIZE * SIZE


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 18, 31, 32, 33, 34])
async def test_at_least_two_tokens_are_computed_where_there_are_two(
    worker: Worker, tokens: int
) -> None:
    _, text = await worker.say(PROMPT[:tokens])
    worker.backend.chunks.clear()
    cached, again = await worker.say(PROMPT[:tokens])
    assert again == text
    assert cached == max(0, tokens - 2) // SIZE * SIZE
    assert worker.backend.chunks == ([(cached, tokens - cached)] if tokens > 1 else [])


async def test_nothing_is_found_under_another_salt_or_without_one(worker: Worker) -> None:
    for salt in (b"a", b"b", b"", b""):
        assert (await worker.say(PROMPT, salt))[0] == 0
    assert (await worker.say(PROMPT, b"a"))[0] == 64


async def test_logprobs_of_the_prompt_are_those_of_all_its_tokens(worker: Worker) -> None:
    await worker.say(PROMPT)
    made = msgspec.structs.replace(worker.spec(PROMPT, max_tokens=1), prompt_logprobs=0)
    worker.peer.send(Prefill(spec=made))
    first: FirstToken = await worker.peer.hear(FirstToken)
    assert (first.cached, len(first.prompt_logprobs)) == (0, len(PROMPT) - 1)


async def test_what_is_kept_gives_way_and_nothing_is_refused_for_it(worker: Worker) -> None:
    for number in range(12):  # five blocks and more each, in a pool of 32
        assert (await worker.say([number + 1] * 80))[0] == 0
    assert len(worker.reuse.prefixes) > 20
    assert (await worker.say([12] * 80))[0] == 64
    assert (await worker.say([1] * 480, max_tokens=2))[0] == 0
    held = [(why, count) for why, _, count in worker.host._ledger.holders()]
    assert [why for why, _ in held] == ["cached"]
    assert held[0][1] >= 30


async def test_sequences_preempt_each_other_only_when_nothing_is_idle(worker: Worker) -> None:
    await worker.say([9] * 400)
    worker.begin([1] * 80, max_tokens=300)
    worker.begin([2] * 80, max_tokens=300)
    lost, ended = 0, 0
    while lost + ended < 2:
        message = await worker.peer.hear(Tokens, Failed)
        if isinstance(message, Failed):
            assert (message.code, message.retry) == ("preempted", True)
            lost += 1
        else:
            ended += sum(row.finish is not None for row in message.rows)
    assert (lost, ended) == (1, 1)
    assert worker.host._ledger.free == BLOCKS
    await worker.proven()


@pytest.mark.parametrize("place", [0, 2])
async def test_a_flipped_bit_costs_a_prefill_and_no_token(worker: Worker, place: int) -> None:
    _, text = await worker.say(PROMPT)
    links = chain(worker.backend.info.layout, b"t", PROMPT)
    kept = worker.reuse.prefixes.find(links, 9)
    block = worker.backend.info.layout.block_bytes
    worker.backend.bytes[kept[place].block * block + 37] ^= 0x10
    worker.backend.chunks.clear()
    assert await worker.say(PROMPT) == (SIZE * place, text)
    assert worker.backend.chunks == [(SIZE * place, 80 - SIZE * place)]
    assert await worker.say(PROMPT) == (64, text)


async def test_what_a_failed_step_used_is_kept_no_longer(worker: Worker) -> None:
    await worker.say(PROMPT)
    await worker.say([7] * 80)
    worker.backend.fail = True
    worker.begin(PROMPT)
    assert (await worker.peer.hear(Failed)).code == "step_failed"
    assert (await worker.say(PROMPT))[0] == 0
    assert (await worker.say([7] * 80))[0] == 64


async def test_nor_is_what_a_sequence_had_when_its_step_failed(worker: Worker) -> None:
    worker.begin(PROMPT, max_tokens=200)
    await worker.peer.hear(Tokens)
    worker.backend.fail = True
    failed: Failed = await worker.peer.hear(Failed)
    assert (failed.phase, failed.code) == ("decode", "step_failed")
    assert len(worker.reuse.prefixes) == 0
    assert (await worker.say(PROMPT))[0] == 0


async def test_nobody_waits_for_a_look_at_another_s_blocks_and_a_cancel_does_not_either(
    worker: Worker,
) -> None:
    await worker.say(PROMPT)
    let = threading.Event()
    worker.reuse._checker.submit(let.wait, 5)
    handle = worker.begin(PROMPT)
    assert (await worker.say([5] * 40))[0] == 0
    (waiting,) = worker.host._requests.steps._prefills
    assert waiting.checking
    worker.peer.send(Cancel(handle=handle))
    assert await worker.peer.free() == BLOCKS
    let.set()
    assert (await worker.say(PROMPT))[0] == 64


async def test_gateways_hear_of_what_is_kept_and_of_what_goes(worker: Worker) -> None:
    layout = worker.backend.info.layout
    fresh: Cached = await (await _other(worker)).hear(Cached)
    assert (fresh.fresh, fresh.number, fresh.added) == (True, 0, b"")
    await worker.say(PROMPT, max_tokens=1)
    marks = [mark(it) for it in chain(layout, b"t", PROMPT)]
    late = await _other(worker)
    fresh = await late.hear(Cached)
    assert (fresh.fresh, set(unpack(fresh.added))) == (True, set(marks))
    await worker.say([1] * 496, max_tokens=1)
    added, removed, number = set[int](), set[int](), 0
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(added) < 31:
            news: Cached = await late.hear(Cached)
            number += 1
            assert (news.number, news.fresh) == (number, False)
            added |= set(unpack(news.added))
            removed |= set(unpack(news.removed))
    assert added == {mark(it) for it in chain(layout, b"t", [1] * 496)}
    assert removed == set(marks) - {marks[0]} or removed == set(marks)


async def _other(worker: Worker) -> Peer:
    return await (await Site(worker.host.address.removeprefix("unix:"), worker.host).peer()).greet()


@pytest.mark.parametrize(
    ("wanted", "changes", "enabled"),
    [
        ("auto", {}, True),
        ("off", {}, False),
        ("auto", {"continuation": "equivalent"}, False),
        ("on", {"continuation": "equivalent"}, True),
        ("auto", {"continuation": "equivalent", "dtype": "float32", "weights": "float32"}, True),
        ("on", {"windows": (8, 0)}, False),
    ],
)
def test_by_default_kv_is_reused_where_that_changes_no_text(
    wanted: Any, changes: dict[str, Any], enabled: bool
) -> None:
    info = SyntheticBackend(**SHAPE).info
    layout = {name: it for name, it in changes.items() if name != "continuation"}
    info = msgspec.structs.replace(
        info,
        layout=msgspec.structs.replace(info.layout, **layout),
        continuation=changes.get("continuation", "exact"),
    )
    made = Reuse(wanted, info, None, Ledger(4), lambda: None)
    assert made.enabled is enabled
    assert bool(made.links(b"salt", PROMPT)) is enabled


async def test_where_it_is_off_nothing_is_kept() -> None:
    async for worker in working(reuse="off"):
        await worker.say(PROMPT)
        assert (await worker.say(PROMPT))[0] == 0
        assert not worker.host._ledger.holders()
