"""No request keeps the others waiting: the loop is never held for long."""

import asyncio
import json
import time

import aiohttp
import pytest
from carrier import MODEL, Served, serving
from events import events

from gateway.text import Vocabulary
from tests.support.watch import LIMIT_SECONDS, slow_callbacks

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


async def hold_the_loop(_: Served, __: aiohttp.ClientSession) -> None:
    end = time.thread_time() + 1.5 * LIMIT_SECONDS
    while time.thread_time() < end:
        pass


async def many_streams(_: Served, http: aiohttp.ClientSession) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64}
    one = {**chat, "ignore_eos": True, "n": 2, "stop": ["never"], "logprobs": True}
    await asyncio.gather(*(events(http, CHATS, **one) for _ in range(64)))


async def a_prompt_that_fills_the_context(_: Served, http: aiohttp.ClientSession) -> None:
    await events(http, TEXTS, model=MODEL, prompt="a quiet river " * 2700, max_tokens=2)


async def a_body_as_large_as_may_be(_: Served, http: aiohttp.ClientSession) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * (4 * 1024 * 1024 - 100)})
    async with http.post(TEXTS, data=body, headers={"Content-Type": "application/json"}) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "context_length_exceeded"


async def a_chat_of_many_messages(_: Served, http: aiohttp.ClientSession) -> None:
    messages = [{"role": role, "content": "hm"} for role in ("user", "assistant")] * 400
    await events(http, CHATS, model=MODEL, messages=messages, max_tokens=2)


def watch(vocabulary: Vocabulary, load) -> list[str]:
    async def work() -> None:
        async with serving(vocabulary) as served, aiohttp.ClientSession(served.url) as http:
            await load(served, http)

    return slow_callbacks(work)


@pytest.mark.parametrize(
    "load",
    [
        many_streams,
        a_prompt_that_fills_the_context,
        a_body_as_large_as_may_be,
        a_chat_of_many_messages,
    ],
    ids=lambda it: it.__name__,
)
def test_no_callback_holds_the_loop(vocabulary: Vocabulary, load):
    assert not watch(vocabulary, load)


def test_a_callback_that_holds_the_loop_is_noticed(vocabulary: Vocabulary):
    assert watch(vocabulary, hold_the_loop)
