"""What a stream consists of, event by event."""

import asyncio
import json

import aiohttp
import pytest
from carrier import CACHED, MODEL, SAID, Served, serving, until
from events import events, finishes, said
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_slow_client import LONG, lazy_client

from gateway import errors
from gateway.life.job import Job, Listener, Timeline

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi", "max_tokens": 64}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


async def test_a_chat_streams_role_then_text_then_finish_then_done(
    http: aiohttp.ClientSession,
):
    *chunks, done = await events(http, CHATS, **CHAT)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert deltas[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "finish_reason": None,
    }
    assert all(delta["delta"].keys() == {"content"} for delta in deltas[1:-1])
    assert all(delta["delta"]["content"] for delta in deltas[1:-1])
    assert deltas[-1] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert said(chunks) == SAID
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_a_token_is_a_chunk_unless_it_is_half_a_character(http: aiohttp.ClientSession):
    *chunks, _ = await events(http, TEXTS, **TEXT, ignore_eos=True)
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert texts == ["Hello", " there", ",", " ", "🙃", " friend", "."] * 8


async def test_every_choice_of_a_completion_says_that_it_has_no_logprobs(
    http: aiohttp.ClientSession,
):
    *chunks, _ = await events(http, TEXTS, **TEXT)
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)


async def test_usage_is_null_until_it_is_told(http: aiohttp.ClientSession):
    options = {"stream_options": {"include_usage": True}}
    *chunks, last, done = await events(http, CHATS, **CHAT, **options)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": CACHED}


async def test_without_being_asked_for_usage_is_not_told(http: aiohttp.ClientSession):
    *chunks, _ = await events(http, CHATS, **CHAT)
    assert all("usage" not in chunk for chunk in chunks)


async def test_running_usage_counts_up_on_every_chunk(http: aiohttp.ClientSession):
    options = {"stream_options": {"continuous_usage_stats": True}}
    *chunks, _ = await events(http, CHATS, **CHAT, **options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3


async def test_token_ids_are_told_with_their_text(served: Served, http: aiohttp.ClientSession):
    *chunks, _ = await events(http, CHATS, **CHAT, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == served.carrier.jobs[0].prompt
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == [*served.carrier.tokens, 2]
    *chunks, _ = await events(http, TEXTS, **TEXT, return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == served.carrier.jobs[1].prompt


async def test_every_token_has_its_logprob_whatever_is_held_back(
    served: Served, http: aiohttp.ClientSession
):
    *chunks, _ = await events(http, CHATS, **CHAT, logprobs=True, top_logprobs=1, stop=["friends"])
    told = [
        entry
        for chunk in chunks
        for entry in chunk["choices"][0].get("logprobs", {}).get("content", [])
    ]
    data = b"".join(bytes(entry["bytes"]) for entry in told)
    assert data.decode() == SAID + "<|im_end|>"
    assert said(chunks) == SAID


async def test_choices_finish_each_by_itself(http: aiohttp.ClientSession):
    *chunks, _ = await events(http, CHATS, **CHAT, n=3)
    assert sorted(finishes(chunks)) == [(0, "stop"), (1, "stop"), (2, "stop")]
    assert {said(chunks, index) for index in range(3)} == {SAID}


async def test_prompts_stream_side_by_side(http: aiohttp.ClientSession):
    body = TEXT | {"prompt": ["one", "two"], "n": 2, "echo": True}
    *chunks, _ = await events(http, TEXTS, **body)
    assert sorted(finishes(chunks)) == [(index, "stop") for index in range(4)]
    assert [said(chunks, index) for index in range(4)] == [
        *["one" + SAID] * 2,
        *["two" + SAID] * 2,
    ]


async def test_one_failing_prompt_ends_them_all(served: Served, http: aiohttp.ClientSession):
    served.carrier.failures[3] = errors.WorkerFailed("decode", "d0", "it died")
    *_, last = await events(http, TEXTS, **TEXT | {"prompt": ["one", "two"]})
    assert last["error"]["code"] == "worker_failed"
    assert served.carrier.running == 0


async def test_a_stream_that_breaks_tells_neither_finish_nor_done(
    served: Served, http: aiohttp.ClientSession
):
    served.carrier.failures[3] = errors.DeadlineExceeded("decoding")
    *chunks, last = await events(http, CHATS, **CHAT)
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["code"] == "deadline_exceeded"
    assert finishes(chunks) == []
    assert served.observed[-1]["status"] == 504


class Silent:
    """Ends jobs without a reason."""

    def pause(self, job: Job, index: int, paused: bool) -> None: ...

    async def carry(self, job: Job, listener: Listener) -> Timeline:
        if job.max_tokens > 1:
            listener.sequence(0)(19556, None, None)
            await asyncio.sleep(0.01)
        return Timeline(decode_worker="d0")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_end_without_a_reason_is_an_error(vocabulary, stream: bool):
    async with (
        serving(vocabulary, carrier=Silent()) as served,
        aiohttp.ClientSession(served.url) as http,
    ):
        async with http.post(CHATS, json=CHAT | {"max_tokens": 1, "stream": stream}) as answer:
            assert answer.status == 502 or b'"error"' in await answer.read()
        if stream:
            *chunks, last = await events(http, CHATS, **CHAT)
            assert last["error"]["code"] == "worker_failed"
            assert finishes(chunks) == []


async def test_a_long_wait_is_bridged_by_comments(vocabulary):
    async with serving(vocabulary, keep_alive_seconds=0.02) as served:
        go = asyncio.Event()
        served.carrier.before = lambda _: go.wait()
        async with (
            aiohttp.ClientSession(served.url) as http,
            http.post(CHATS, json=CHAT | {"stream": True}) as answer,
        ):
            assert await answer.content.readline() == b": keep-alive\n"
            assert await answer.content.readline() == b"\n"
            assert await answer.content.readline() == b": keep-alive\n"
            go.set()
            rest = (await answer.read()).decode()
    assert rest.endswith("data: [DONE]\n\n")


async def test_a_failure_after_a_comment_is_an_event(vocabulary):
    async with serving(vocabulary, keep_alive_seconds=0.02) as served:
        go = asyncio.Event()
        served.carrier.before = lambda _: go.wait()
        served.carrier.failures[1] = errors.NoWorkers("they left")
        async with (
            aiohttp.ClientSession(served.url) as http,
            http.post(CHATS, json=CHAT | {"stream": True}) as answer,
        ):
            assert await answer.content.readline() == b": keep-alive\n"
            go.set()
            assert b'"code":"no_workers"' in await answer.read()


async def old_client(served: Served) -> bytes:
    """What a client of HTTP/1.0 reads until the connection ends."""
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_an_old_client_gets_it_unchunked(served: Served):
    head, _, text = (await old_client(served)).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.0 200")
    assert "chunked" not in head.lower()
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert said([json.loads(line[6:]) for line in lines[:-1]]) == SAID
    assert lines[-1] == "data: [DONE]"


async def test_half_a_character_is_shown_before_what_follows_it(
    served: Served, http: aiohttp.ClientSession
):
    hello, there, _, half, *_ = served.carrier.tokens
    served.carrier.tokens = [hello, half, there]
    *chunks, _ = await events(http, TEXTS, **TEXT | {"max_tokens": 30}, ignore_eos=True)
    assert said(chunks) == "Hello \ufffd there" * 10


async def test_a_stop_string_is_found_among_well_known_tokens(
    served: Served, http: aiohttp.ClientSession
):
    for _ in range(2):
        *chunks, _ = await events(http, TEXTS, **TEXT, stop=".Hello", ignore_eos=True)
        assert said(chunks) == SAID.removesuffix(".")
        assert finishes(chunks) == [(0, "stop")]


async def test_the_short_way_heeds_a_client_that_is_behind(vocabulary):
    async with (
        serving(vocabulary, said="Hello there") as served,
        lazy_client(served, LONG),
    ):
        await until(lambda: any(paused for _, _, paused in served.carrier.pauses))
        assert served.carrier.steps < LONG["max_tokens"]


async def test_the_connection_serves_on_after_a_stream(served: Served):
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(served.url, connector=connector) as http:
        for _ in range(3):
            *chunks, _ = await events(http, CHATS, **CHAT)
            assert said(chunks) == SAID


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(min_size=1, max_size=40), stop=st.none() | st.text("abe \n", min_size=1))
def test_a_streamed_text_is_the_whole_text(vocabulary, text: str, stop: str | None):
    async def compare() -> None:
        async with (
            serving(vocabulary, said=text) as served,
            aiohttp.ClientSession(served.url) as http,
        ):
            body = TEXT | {"max_tokens": 200, "stop": stop}
            async with http.post(TEXTS, json=body) as answer:
                (whole,) = (await answer.json())["choices"]
            *chunks, _ = await events(http, TEXTS, **body)
            assert said(chunks) == whole["text"]
            assert finishes(chunks) == [(0, whole["finish_reason"])]
            expected = vocabulary.decode(served.carrier.tokens, skip_special_tokens=True)
            if stop is None or stop not in expected:
                assert whole["text"] == expected
            else:
                assert whole["text"] == expected[: expected.index(stop)]

    asyncio.run(compare())


async def test_a_client_that_leaves_while_it_waits_is_forgotten(
    served: Served, http: aiohttp.ClientSession
):
    forever = asyncio.Event()
    served.carrier.before = lambda _: forever.wait()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(http.post(CHATS, json=CHAT | {"stream": True}))
        await until(lambda: served.carrier.running == 1)
        asking.cancel()
    await until(lambda: served.carrier.running == 0)
    await until(lambda: bool(served.observed))
    assert served.observed[-1]["status"] == 499
