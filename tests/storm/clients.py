"""Those who ask, and what they must hear: the whole right text, or why not."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import msgspec

from loadtest.chat import RequestRefused, StreamFailed
from loadtest.resuming import GaveUp, Resuming
from loadtest.sse import Events
from tests.storm.site import MODEL

End = Literal["whole", "error", "broken", "cut"]
PATIENCE_SECONDS = 20.0
"""How long a client looks for a gateway that it can connect to."""

PAUSE_SECONDS = 0.2
STEADY_SECONDS = 120.0
"""How long a reconnecting client hopes for a new word."""


class Ask(msgspec.Struct, frozen=True):
    """One completion: a prompt of token ids, and how it is continued."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    n: int = 1

    @property
    def body(self) -> dict[str, Any]:
        """As it is posted."""
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "n": self.n,
            "stream": True,
            "return_token_ids": True,
            "temperature": 0,
            "ignore_eos": True,
        }


@dataclass
class Answer:
    """What one client heard.

    `end` is `whole`, a typed `error`, a connection that was `broken` for all to see, or a stream
    that was `cut` and looks like an end, which must never be.
    """

    end: End = "broken"
    code: str = ""
    detail: str = ""
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    attempts: int = 0
    resumed: int = 0
    longest_pause: float = 0.0
    began: float = 0.0
    last: float = 0.0

    def tick(self) -> None:
        """Something new has come."""
        now = time.monotonic()
        self.longest_pause = max(self.longest_pause, now - (self.last or now))
        self.last = now


class Ordinary:
    """Streams, and knows several gateways: one that it cannot connect to is passed over.

    After an error it leaves the gateways alone for a moment, as it is asked to.
    """

    steady = False

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str]) -> None:
        self._http = http
        self._urls = urls
        self._turn = 0

    async def ask(self, ask: Ask) -> Answer:
        """One answer, however it ends."""
        answer = Answer(began=time.monotonic())
        while True:
            answer.attempts += 1
            self._turn += 1
            url = self._urls[self._turn % len(self._urls)]
            try:
                async with self._http.post(f"{url}/v1/completions", json=ask.body) as got:
                    await hear(got, answer)
                    wait = float(got.headers.get("Retry-After", 0))
            except aiohttp.ClientConnectorError as error:
                answer.attempts -= 1
                answer.detail = f"not connected: {error}"
                if time.monotonic() - answer.began < PATIENCE_SECONDS:
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                answer.detail = f"{url}: {type(error).__name__}: {error}"
            else:
                await asyncio.sleep(wait)
            return answer


class Steady:
    """Asks again under the same key until it has everything: a cut stream goes on where it was."""

    steady = True

    def __init__(self, _: aiohttp.ClientSession, urls: Sequence[str]) -> None:
        self._urls = [*urls]
        self._thread = ThreadPoolExecutor(1)

    async def ask(self, ask: Ask) -> Answer:
        """The whole answer, or why asking again did not help."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._ask, ask)

    def _ask(self, ask: Ask) -> Answer:
        answer = Answer(began=time.monotonic())
        random.shuffle(self._urls)
        client = Resuming(self._urls, patience_seconds=STEADY_SECONDS)
        try:
            for chunk in client.stream("/v1/completions", ask.body):
                answer.tick()
                add(chunk, answer)
            answer.end = "whole"
        except (RequestRefused, StreamFailed, GaveUp) as error:
            answer.end, answer.code, answer.detail = "error", type(error).__name__, str(error)
        answer.resumed = client.reconnects
        answer.attempts = 1 + client.reconnects
        return answer


async def hear(got: aiohttp.ClientResponse, answer: Answer) -> None:
    """Take one response in; a connection that breaks raises."""
    if got.status != 200:
        body = await got.json()
        answer.end, answer.code = "error", body["error"]["code"]
        answer.detail = f"{got.status}: {body['error']['message']}"
        return
    events = Events()
    async for piece in got.content.iter_any():
        for data in events.feed(piece):
            answer.tick()
            take(data, answer)
    if answer.end == "broken":
        answer.end = "cut"


def take(data: str, answer: Answer) -> None:
    """One event of a stream."""
    if data == "[DONE]":
        answer.end = "whole"
        return
    event = msgspec.json.decode(data)
    if "error" in event:
        answer.end, answer.code = "error", event["error"]["code"]
        answer.detail = event["error"]["message"]
        return
    add(event, answer)


def add(chunk: dict[str, Any], answer: Answer) -> None:
    """What one chunk says."""
    for choice in chunk["choices"]:
        index = choice["index"]
        answer.text[index] = answer.text.get(index, "") + choice["text"]
        answer.tokens.setdefault(index, []).extend(choice.get("token_ids") or ())
        if choice["finish_reason"]:
            answer.finish[index] = choice["finish_reason"]
