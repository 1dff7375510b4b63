"""Answers in one piece, and the jobs that are made for them."""

from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from carrier import CACHED, MODEL, SAID, Served

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "one two", "max_tokens": 3}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


async def ask(http: aiohttp.ClientSession, path: str, **body: Any) -> dict[str, Any]:
    async with http.post(path, json=body) as answer:
        told: dict[str, Any] = await answer.json()
        assert answer.status == 200, told
    return told


async def test_a_chat_has_every_required_field(http: aiohttp.ClientSession):
    told = await ask(http, CHATS, **CHAT)
    assert told.keys() == {"id", "object", "created", "model", "choices", "usage"}
    (choice,) = told["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": SAID, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }


async def test_a_completion_has_every_required_field(http: aiohttp.ClientSession):
    told = await ask(http, TEXTS, **TEXT)
    assert told["object"] == "text_completion"
    assert told["choices"] == [
        {"index": 0, "text": "Hello there,", "logprobs": None, "finish_reason": "length"}
    ]
    assert told["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": CACHED},
    }


async def test_bytes_that_never_became_a_character_are_shown_as_such(http: aiohttp.ClientSession):
    told = await ask(http, TEXTS, **TEXT | {"max_tokens": 5})
    assert told["choices"][0]["text"] == "Hello there, \ufffd"


async def test_tokens_past_a_stop_string_are_neither_shown_nor_counted(
    served: Served, http: aiohttp.ClientSession
):
    told = await ask(http, TEXTS, **TEXT | {"max_tokens": 64}, stop="re,", ignore_eos=True)
    assert told["choices"][0]["text"] == "Hello the"
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["completion_tokens"] == 3
    assert served.carrier.steps == 3


async def test_the_stop_string_is_shown_on_request(http: aiohttp.ClientSession):
    body = TEXT | {"max_tokens": 64, "stop": ["the", "re,"], "include_stop_str_in_output": True}
    told = await ask(http, TEXTS, **body)
    assert told["choices"][0]["text"] == "Hello the"


async def test_completion_logprobs_are_columns_that_fit_the_text(http: aiohttp.ClientSession):
    told = await ask(http, TEXTS, **TEXT | {"max_tokens": 8}, logprobs=2, echo=True)
    (choice,) = told["choices"]
    columns = choice["logprobs"]
    assert choice["text"] == "one two" + SAID
    assert {len(column) for column in columns.values()} == {10}
    assert columns["token_logprobs"][0] is None
    assert columns["top_logprobs"][0] is None
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    assert all(len(top) == 2 for top in columns["top_logprobs"][1:])


async def test_half_a_character_is_spelled_in_bytes(http: aiohttp.ClientSession):
    told = await ask(http, TEXTS, **TEXT | {"max_tokens": 8}, logprobs=0)
    spelled = [one for one in told["choices"][0]["logprobs"]["tokens"] if one[:6] == "bytes:"]
    data = "".join(one.removeprefix("bytes:").replace("\\x", "") for one in spelled)
    assert "🙃".encode() in b" " + bytes.fromhex(data)


async def test_a_prompt_is_scored_without_generating(served: Served, http: aiohttp.ClientSession):
    told = await ask(http, TEXTS, **TEXT | {"max_tokens": 0}, echo=True, logprobs=1)
    (choice,) = told["choices"]
    assert choice["text"] == "one two"
    assert choice["logprobs"]["tokens"] == ["one", " two"]
    assert choice["finish_reason"] == "length"
    assert told["usage"]["completion_tokens"] == 0
    assert served.carrier.jobs[0].max_tokens == 1


async def test_one_token_of_a_prompt_can_be_echoed_with_logprobs(http: aiohttp.ClientSession):
    body = TEXT | {"prompt": [19556], "max_tokens": 1}
    told = await ask(http, TEXTS, **body, echo=True, logprobs=0)
    assert told["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.25]


async def test_choices_are_numbered_through_all_prompts(http: aiohttp.ClientSession):
    told = await ask(http, TEXTS, **TEXT | {"prompt": ["a", "b c"], "n": 2}, echo=True)
    assert [(one["index"], one["text"][:1]) for one in told["choices"]] == [
        *[(0, "a"), (1, "a")],
        *[(2, "b"), (3, "b")],
    ]
    usage = told["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2 * CACHED}


async def test_token_ids_are_told_on_request(served: Served, http: aiohttp.ClientSession):
    told = await ask(http, CHATS, **CHAT, return_token_ids=True)
    assert told["prompt_token_ids"] == served.carrier.jobs[0].prompt
    assert told["choices"][0]["token_ids"] == [*served.carrier.tokens, 2]


async def test_a_seed_gives_the_same_seeds_and_no_two_alike(
    served: Served, http: aiohttp.ClientSession
):
    for seed in (7, 7, -7, 2**63 - 1, None, None):
        await ask(http, TEXTS, **TEXT, n=3, seed=seed)
    first, again, *others = (job.seeds for job in served.carrier.jobs)
    assert first == again
    seeds = [one for some in (first, *others) for one in some]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= one < 2**63 for one in seeds)


async def test_the_queue_books_what_is_likely(served: Served, http: aiohttp.ClientSession):
    await ask(http, CHATS, **CHAT)
    await ask(http, CHATS, **CHAT, max_tokens=20)
    await ask(http, CHATS, **CHAT, max_tokens=300, ignore_eos=True)
    unset, little, forced = served.carrier.jobs
    assert unset.max_tokens == 8192 - len(unset.prompt)
    assert unset.decode_estimate == served.service.expected_output_tokens
    assert (little.max_tokens, little.decode_estimate) == (20, 20)
    assert forced.decode_estimate == 300


async def test_a_completion_has_sixteen_tokens_unless_told(
    served: Served, http: aiohttp.ClientSession
):
    await ask(http, TEXTS, model=MODEL, prompt="x")
    assert served.carrier.jobs[0].max_tokens == 16


async def test_kv_is_reused_for_the_same_tenant_and_salt_alone(
    served: Served, http: aiohttp.ClientSession
):
    for salt in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        await ask(http, CHATS, **CHAT, **salt)
    none, again, one, other = (job.salt for job in served.carrier.jobs)
    assert none == again
    service = served.service
    assert len({none, one, other, service.salt("x", ""), service.salt("y", "")}) == 5
    shared = replace(service, share_prefixes=True)
    assert shared.salt("x", "") == shared.salt("y", "") != b""
    assert shared.salt("x", "a") != shared.salt("y", "b")


async def test_parts_of_a_content_are_one_text(served: Served, http: aiohttp.ClientSession):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    await ask(http, CHATS, **CHAT)
    await ask(http, CHATS, **CHAT | {"messages": [{"role": "user", "content": parts}]})
    whole, joined = served.carrier.jobs
    assert whole.prompt == joined.prompt


async def test_a_developer_is_a_system(served: Served, http: aiohttp.ClientSession):
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "be brief"}, *CHAT["messages"]]
        await ask(http, CHATS, **CHAT | {"messages": messages})
    system, developer = served.carrier.jobs
    assert system.prompt == developer.prompt


async def test_either_name_sets_the_limit(served: Served, http: aiohttp.ClientSession):
    await ask(http, CHATS, **CHAT, max_completion_tokens=4)
    await ask(http, CHATS, **CHAT, max_completion_tokens=5, max_tokens=5)
    assert [job.max_tokens for job in served.carrier.jobs] == [4, 5]


@pytest.mark.parametrize("model", [None, MODEL])
async def test_no_model_means_the_one_there_is(http: aiohttp.ClientSession, model: str | None):
    told = await ask(http, CHATS, **CHAT | {"model": model})
    assert told["model"] == MODEL


async def test_tokens_can_be_counted_and_read(served: Served, http: aiohttp.ClientSession):
    told = await ask(http, "/tokenize", prompt="Hello there", return_token_strs=True)
    assert told == {
        "count": 2,
        "max_model_len": 8192,
        "tokens": [19556, 665],
        "token_strs": ["Hello", " there"],
    }
    assert await ask(http, "/detokenize", tokens=told["tokens"]) == {"prompt": "Hello there"}
    chat = await ask(http, "/tokenize", messages=CHAT["messages"])
    await ask(http, CHATS, **CHAT)
    assert chat["tokens"] == served.carrier.jobs[0].prompt
