"""Those who ask, and what they must hear: the whole right text, or why not."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import msgspec

from loadtest.sse import Events
from tests.storm.site import MODEL

End = Literal["whole", "error", "broken", "cut"]
PATIENCE_SECONDS = 20.0
"""How long a client looks for a gateway that it can connect to."""

PAUSE_SECONDS = 0.2
STEADY_SECONDS = 60.0
"""How long a reconnecting client goes on without having heard a word."""

FINAL = frozenset({"deadline_exceeded", "invalid_value", "context_length_exceeded"})
"""Codes for which asking again is of no use."""


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
    event_id: str = ""


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


class Steady(Ordinary):
    """Asks again under the same key until it has everything: a cut stream goes on where it was."""

    steady = True

    async def ask(self, ask: Ask) -> Answer:
        """The whole answer, or why `PATIENCE_SECONDS` of asking again did not help."""
        answer = Answer(began=time.monotonic(), last=time.monotonic())
        key = secrets.token_hex(16)
        while True:
            headers = {"Idempotency-Key": key}
            if answer.event_id:
                headers["Last-Event-ID"] = answer.event_id
                answer.resumed += 1
            else:  # it is told everything again
                answer.tokens, answer.text, answer.finish = {}, {}, {}
            wait = await self._try(ask, answer, headers)
            if answer.end == "whole" or answer.code in FINAL:
                return answer
            if time.monotonic() - answer.last > STEADY_SECONDS:
                return answer
            await asyncio.sleep(wait)

    async def _try(self, ask: Ask, answer: Answer, headers: dict[str, str]) -> float:
        answer.attempts += 1
        answer.end, answer.code = "broken", ""
        self._turn += 1
        url = self._urls[self._turn % len(self._urls)]
        try:
            async with self._http.post(
                f"{url}/v1/completions", json=ask.body, headers=headers
            ) as got:
                await hear(got, answer)
                return float(got.headers.get("Retry-After", PAUSE_SECONDS))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.attempts -= isinstance(error, aiohttp.ClientConnectorError)
            answer.detail = f"{url}: {type(error).__name__}: {error}"
        return PAUSE_SECONDS


async def hear(got: aiohttp.ClientResponse, answer: Answer) -> None:
    """Take one response in; a connection that breaks raises."""
    if got.status != 200:
        body = await got.json()
        answer.end, answer.code = "error", body["error"]["code"]
        answer.detail = f"{got.status}: {body['error']['message']}"
        return
    events = Numbered()
    answer.last = answer.last or time.monotonic()
    async for piece in got.content.iter_any():
        for number, data in events.feed(piece):
            now = time.monotonic()
            answer.longest_pause = max(answer.longest_pause, now - answer.last)
            answer.last = now
            answer.event_id = number or answer.event_id
            take(data, answer)
    if answer.end == "broken":
        answer.end = "cut"


class Numbered:
    """Cuts bytes into events with their ids."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[tuple[str, str]]:
        """The id, where it has one, and the data of each event that ends in `piece`."""
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        for event in events:
            ids = [line[3:].strip() for line in event.split(b"\n") if line.startswith(b"id:")]
            for data in Events().feed(event + b"\n\n"):
                yield ids[-1].decode() if ids else "", data


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
    for choice in event["choices"]:
        index = choice["index"]
        answer.text[index] = answer.text.get(index, "") + choice["text"]
        answer.tokens.setdefault(index, []).extend(choice.get("token_ids") or ())
        if choice["finish_reason"]:
            answer.finish[index] = choice["finish_reason"]
