"""Everything a client can get wrong has its 4xx, names the field, and leaves nothing behind."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from carrier import MODEL, Served, serving
from gguf import GGUFWriter

from gateway.text import load_text
from gateway.text.pieces import BYTE_OF
from tests.support.patience import PATIENCE_SECONDS

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
KEYS = {"message", "type", "param", "code"}


async def problem(
    http: aiohttp.ClientSession, path: str, body: Any, status: int = 400
) -> dict[str, Any]:
    """The error that `body` gets."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    async with http.post(path, data=data, headers=headers) as answer:
        told = await answer.json()
        assert answer.status == status, told
        assert answer.headers["x-request-id"]
    assert told.keys() == {"error"}
    error: dict[str, Any] = told["error"]
    assert error.keys() == KEYS
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "smollm2", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "smollm2", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "smollm2", "temperature": NaN}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": []} trailing',
    ],
)
@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_what_is_not_json_is_refused(
    served: Served, http: aiohttp.ClientSession, path: str, body: bytes
):
    await problem(http, path, body)
    assert served.carrier.jobs == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            "messages[0].tool_calls",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 9000}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"web_search_options": {"x": 1}}, "web_search_options"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
async def test_a_bad_chat_is_refused_by_name(
    served: Served, http: aiohttp.ClientSession, change: dict[str, Any], param: str
):
    error = await problem(http, CHATS, CHAT | change)
    assert (error["param"] or "").startswith(param)
    assert served.carrier.jobs == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**30}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop_token_ids": [49152]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"model": 7}, "model"),
    ],
)
@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_a_bad_field_is_refused_by_name_on_both_routes(
    served: Served, http: aiohttp.ClientSession, path: str, change: dict[str, Any], param: str
):
    error = await problem(http, path, (CHAT if path == CHATS else TEXT) | change)
    assert (error["param"] or "").startswith(param)
    assert served.carrier.jobs == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[1], [1.5]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)
async def test_a_bad_completion_is_refused_by_name(
    served: Served, http: aiohttp.ClientSession, change: dict[str, Any], param: str
):
    error = await problem(http, TEXTS, TEXT | change)
    assert (error["param"] or "").startswith(param)
    assert served.carrier.jobs == []


@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_a_missing_field_is_named(http: aiohttp.ClientSession, path: str):
    error = await problem(http, path, {"model": MODEL})
    assert error["param"] == ("messages" if path == CHATS else "prompt")


async def test_an_unknown_model_is_not_found(served: Served, http: aiohttp.ClientSession):
    error = await problem(http, CHATS, CHAT | {"model": "gpt-9"}, status=404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert served.carrier.jobs == []


async def test_a_prompt_beyond_the_context_is_refused_with_its_length(
    served: Served, http: aiohttp.ClientSession
):
    for words in (8200, 100_000):
        content = "hello " * words
        chat = CHAT | {"messages": [{"role": "user", "content": content}]}
        for path, body in ((CHATS, chat), (TEXTS, TEXT | {"prompt": content})):
            error = await problem(http, path, body)
            assert error["code"] == "context_length_exceeded"
            assert "8192" in error["message"]
    assert served.carrier.jobs == []


async def test_more_tokens_than_a_context_are_not_even_decoded(
    served: Served, http: aiohttp.ClientSession
):
    many = [1] * 100_000
    for path, body in (("/detokenize", {"tokens": many}), (TEXTS, {"prompt": many, "echo": True})):
        error = await problem(http, path, body)
        assert error["code"] == "context_length_exceeded"
    assert served.carrier.jobs == []


async def test_prompt_and_answer_together_must_fit(served: Served, http: aiohttp.ClientSession):
    prompt = [1] * 8190
    error = await problem(http, TEXTS, TEXT | {"prompt": prompt, "max_tokens": 3})
    assert error["code"] == "context_length_exceeded"
    async with http.post(TEXTS, json=TEXT | {"prompt": prompt, "max_tokens": 2}) as answer:
        assert answer.status == 200
    async with http.post(TEXTS, json=TEXT | {"prompt": prompt}) as answer:
        assert answer.status == 200
    assert [job.max_tokens for job in served.carrier.jobs] == [2, 2]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_refused(vocabulary, announced: bool):
    async def parts():
        for _ in range(64):
            yield b" " * 1024

    async with (
        serving(vocabulary, max_body_bytes=4096) as served,
        aiohttp.ClientSession(served.url) as http,
        http.post(
            CHATS,
            data=b" " * 65536 if announced else parts(),
            headers={"Content-Type": "application/json"},
        ) as answer,
    ):
        assert answer.status == 413
        error = (await answer.json())["error"]
        assert error.keys() == KEYS
        assert served.carrier.jobs == []


async def test_a_body_that_does_not_come_is_given_up(vocabulary):
    async with serving(vocabulary, body_timeout_seconds=0.05) as served:
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_model_without_a_template_cannot_chat(tmp_path: Path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*sorted(BYTE_OF), "he"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["h e"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    bare = load_text(tmp_path / "m.gguf")
    async with serving(bare, said="he") as served, aiohttp.ClientSession(served.url) as http:
        error = await problem(http, CHATS, CHAT)
        assert "template" in error["message"]
        async with http.post(TEXTS, json=TEXT) as answer:
            assert answer.status == 200


async def test_unknown_urls_and_methods_have_the_same_shape(http: aiohttp.ClientSession):
    async with http.get("/v1/nothing") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"].keys() == KEYS
    async with http.get(CHATS) as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "POST"
        assert (await answer.json())["error"].keys() == KEYS


HARMLESS = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "seed": -1,
    "stop": None,
    "logit_bias": {},
    "stream": False,
    "stream_options": None,
}


async def test_harmless_fields_are_accepted(served: Served, http: aiohttp.ClientSession):
    chat = {
        "parallel_tool_calls": True,
        "verbosity": "medium",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "audio": None,
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " kind."}],
            },
            {"role": "user", "content": "hi", "name": "ann"},
        ],
    }
    async with http.post(CHATS, json=CHAT | HARMLESS | chat) as answer:
        assert answer.status == 200, await answer.text()
    (job,) = served.carrier.jobs
    assert "system\nBe kind." in served.service.text.decode(job.prompt)
    async with http.post(TEXTS, json=TEXT | HARMLESS | {"best_of": 1, "suffix": None}) as answer:
        assert answer.status == 200, await answer.text()
