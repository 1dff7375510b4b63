"""Two gateways in real processes: one is killed or stopped under streams, and clients come back."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from loadtest.resuming import Resuming
from tests.storm.site import MODEL, Site, site, synthetic, workers
from tests.support.patience import PATIENCE_SECONDS

KEEP_SECONDS = 8.0
TOKENS = 500
"""Five seconds of them: no answer is over when something befalls it."""
TREE: dict[str, Any] = {
    "workers": synthetic(step_seconds=0.01),
    "queue": {"lease_seconds": 3},
    "resume": {"keep_seconds": KEEP_SECONDS},
}


class Reader(Resuming):
    """Reads one answer: its text, its ends, its usage, and how often each thing came."""

    def __init__(self, urls: tuple[str, ...], path: str, body: dict[str, Any]) -> None:
        super().__init__(urls, silence_seconds=2.0)
        self.path = path
        self.body = {"model": MODEL, "stream_options": {"include_usage": True}, **body}
        self.text: dict[int, str] = {}
        self.finish: dict[int, list[str]] = {}
        self.roles: dict[int, int] = {}
        self.usage: list[Any] = []

    def read(self) -> "Reader":
        for chunk in self.stream(self.path, self.body):
            if chunk.get("usage"):
                self.usage.append(chunk["usage"])
            for choice in chunk["choices"]:
                self._take(choice)
        return self

    def _take(self, choice: Any) -> None:
        index = choice["index"]
        delta = choice.get("delta", choice)
        text = delta.get("text") or delta.get("content") or ""
        self.text[index] = self.text.get(index, "") + text
        if "role" in delta:
            self.roles[index] = self.roles.get(index, 0) + 1
        if choice["finish_reason"]:
            self.finish.setdefault(index, []).append(choice["finish_reason"])

    @property
    def all(self) -> tuple[Any, ...]:
        return self.text, self.finish, self.roles, self.usage


def completion(number: int) -> tuple[str, dict[str, Any]]:
    body = {
        "prompt": [[7, number, 9], [number] * (1 + number * 5)],
        "max_tokens": TOKENS,
        "n": 1 + number % 3,
        "seed": number,
        "logprobs": number % 2,
    }
    return "/v1/completions", body


def chat(number: int, tokens: int) -> tuple[str, dict[str, Any]]:
    words = ["Tell me a story about the sea.", "Why is the sky blue?", "Count to forty."]
    body = {
        "messages": [{"role": "user", "content": words[number % len(words)]}],
        "max_tokens": tokens,
        "temperature": 0,
        "seed": number,
    }
    return "/v1/chat/completions", body


async def read_all(readers: list[Reader]) -> None:
    await asyncio.gather(*(asyncio.to_thread(reader.read) for reader in readers))


@asynccontextmanager
async def reading(readers: list[Reader], characters: int) -> AsyncIterator[None]:
    """Inside, each has that much text; after it, all have everything."""
    task = asyncio.ensure_future(read_all(readers))
    try:
        async with asyncio.timeout(4 * PATIENCE_SECONDS):
            while not all(
                reader.text and min(map(len, reader.text.values())) >= characters
                for reader in readers
            ):
                assert not task.done(), task
                await asyncio.sleep(0.01)
        yield
        await asyncio.wait_for(task, 4 * PATIENCE_SECONDS)
    finally:
        task.cancel()


async def nothing_left(made: Site) -> None:
    await made.balanced(KEEP_SECONDS + PATIENCE_SECONDS)
    assert await made.immortal_keys() == []


@pytest.fixture
async def made() -> AsyncIterator[Site]:
    async with site(TREE) as running:
        yield running


async def test_who_comes_back_after_a_killed_gateway_has_the_very_text(made: Site) -> None:
    asks = [completion(number) for number in range(4)] + [chat(1, TOKENS), chat(2, TOKENS)]
    truth = [Reader(made.urls[1:], *ask).read for ask in asks]
    expected = [reader.all for reader in await asyncio.gather(*map(asyncio.to_thread, truth))]
    readers = [Reader(made.urls, *ask) for ask in asks]
    async with reading(readers, 60):
        made.parts["g1"].send(signal.SIGKILL)
    made.parts["g1"].start()
    for reader, right in zip(readers, expected, strict=True):
        assert reader.all == right
    assert all(reader.reconnects for reader in readers)
    await made.ready()
    await nothing_left(made)


async def test_a_gateway_that_was_stopped_is_fenced_when_it_goes_on(made: Site) -> None:
    asks = [completion(number) for number in range(3)]
    truth = [Reader(made.urls[1:], *ask).read for ask in asks]
    expected = [reader.all for reader in await asyncio.gather(*map(asyncio.to_thread, truth))]
    readers = [Reader(made.urls, *ask) for ask in asks]
    async with reading(readers, 40):
        made.parts["g1"].send(signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not all(reader.reconnects for reader in readers):
                await asyncio.sleep(0.01)
        made.parts["g1"].send(signal.SIGCONT)
    for reader, right in zip(readers, expected, strict=True):
        assert reader.all == right
    adopted = [line for name in ("d1", "d2") for line in made.parts[name].events("request.adopted")]
    assert any('"fenced":true' in line.replace(" ", "") for line in adopted), adopted
    await made.ready()
    await nothing_left(made)


async def test_an_answer_in_one_piece_is_there_after_its_gateway_died(made: Site) -> None:
    path, body = completion(2)
    key = {"Idempotency-Key": "one-piece"}
    async with aiohttp.ClientSession() as http:
        async with http.post(made.urls[1] + path, json={"model": MODEL, **body}) as got:
            expected = (await got.json())["choices"]
        asking = asyncio.ensure_future(
            http.post(made.urls[0] + path, json={"model": MODEL, **body}, headers=key)
        )
        await made.until(lambda: _at_work(made), "nothing begins", PATIENCE_SECONDS)
        made.parts["g1"].send(signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await asking
        for _ in range(2):  # the second time from the record
            async with http.post(
                made.urls[1] + path, json={"model": MODEL, **body}, headers=key
            ) as got:
                assert got.status == 200
                assert (await got.json())["choices"] == expected
    made.parts["g1"].start()
    await made.ready()
    await nothing_left(made)


async def _at_work(made: Site) -> bool:
    book = await made.get(made.urls[1], "/debug/ledger")
    return any(it["reason"] == "decode" for one in book["workers"] for it in one["holders"])


async def test_what_nobody_asks_for_again_is_gone_after_the_lease(made: Site) -> None:
    reader = Reader(made.urls[:1], *completion(1))
    stream = reader.stream(reader.path, reader.body)
    await asyncio.to_thread(next, stream)
    made.parts["g1"].send(signal.SIGKILL)
    await asyncio.to_thread(stream.close)
    made.parts["g1"].start()
    await made.ready()
    await nothing_left(made)


@pytest.mark.slow
async def test_the_real_model_goes_on_in_its_own_words() -> None:
    # In bfloat16 they would depend on the batch.
    options = {"pool_tokens": 8192, "dtype": "float32"}
    tree = {**TREE, "workers": workers("emulation", options, threads=1)}
    async with site(tree) as made:
        asks = [chat(number, 60) for number in range(3)]
        expected = []
        for ask in asks:
            reader = Reader(made.urls[1:], *ask)
            expected.append((await asyncio.to_thread(reader.read)).all)
        readers = [Reader(made.urls, *ask) for ask in asks]
        for reader in readers:
            reader.silence_seconds = 20.0
        async with reading(readers, 20):
            made.parts["g1"].send(signal.SIGKILL)
        made.parts["g1"].start()
        for reader, right in zip(readers, expected, strict=True):
            assert reader.all == right
        assert any(reader.reconnects for reader in readers)
        await made.ready()
        await nothing_left(made)
