"""Servers over HTTP on the engine contract: what they are asked, and what their failures become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from backends.api import (
    BackendError,
    BackendMisconfigured,
    DecodeJob,
    Logprob,
    PoolExhausted,
    PrefillJob,
    Sampled,
    Sampling,
    Sequence,
)
from backends.host.plugins import load_backend
from backends.vllm.served import ASK, VllmServedBackend
from gateway.cli.model import find_model
from tests.support.patience import PATIENCE_SECONDS
from tests.vllm_engine.fake_server import KV, TOKENS, FakeServer, serving


class Told:
    """Everything that an engine says, by job."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[Sampled]] = {}
        self.done: dict[str, Any] = {}
        self.errors: dict[str, Exception] = {}
        self.over: set[str] = set()
        self.late = False
        self._ended: dict[str, asyncio.Event] = {}
        self._first: dict[str, asyncio.Event] = {}
        self._loop = asyncio.get_running_loop()

    def prefilled(self, job: str, output: Any, cached: int = 0) -> None:
        self.done[job] = (output, cached)

    def decoded(self, tokens: Any) -> None:
        for job, token in tokens:
            self.late |= job in self.over
            self.tokens.setdefault(job, []).append(token)
            self._loop.call_soon_threadsafe(self.first(job).set)

    def failed(self, job: str, error: Exception) -> None:
        self.errors[job] = error

    def ended(self, job: str) -> None:
        self.over.add(job)
        self._loop.call_soon_threadsafe(self.end(job).set)

    def end(self, job: str) -> asyncio.Event:
        return self._ended.setdefault(job, asyncio.Event())

    def first(self, job: str) -> asyncio.Event:
        return self._first.setdefault(job, asyncio.Event())

    async def until(self, event: asyncio.Event) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await event.wait()

    def text(self, job: str) -> list[int]:
        return [it.token for it in self.tokens.get(job, [])]


@asynccontextmanager
async def backend(decode: FakeServer, prefill: FakeServer | None = None, **options: Any):
    given = {
        "model": str(find_model("bundled")),
        "decode": decode.address,
        "prefill": prefill.address if prefill is not None else "",
        "silence_seconds": 10.0,
        **options,
    }
    made = await asyncio.to_thread(lambda: VllmServedBackend(**given))
    told = Told()
    made.start(told)
    try:
        yield made, told
    finally:
        await asyncio.to_thread(made.close)
        assert not told.late


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with serving() as made:
        yield made


@pytest.fixture
async def other() -> AsyncIterator[FakeServer]:
    async with serving() as made:
        yield made


def job(name: str = "j", *, generated=(), max_tokens: int = 8, **more: Any) -> DecodeJob:
    wishes = more.pop("sampling", Sampling(temperature=0.0))
    prompt = list(range(40, 60))
    sequence = Sequence(prompt=prompt, generated=list(generated), sampling=wishes, seed=3)
    return DecodeJob(name=name, sequence=sequence, max_tokens=max_tokens, **more)


async def test_a_job_that_is_aborted_before_it_began_ends_all_the_same(server) -> None:
    async with backend(server) as (made, told):
        names = [f"j{number}" for number in range(50)]
        for name in names:
            made.decode(job(name))
            made.abort(name)
        for name in names:
            await told.until(told.end(name))
        assert not told.errors
        made.decode(job("after"))
        await told.until(told.end("after"))
        assert told.text("after")


@pytest.mark.parametrize("option", ["silence_seconds", "open_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 1e9])
async def test_a_deadline_that_is_none_is_refused_by_name(server, option, value) -> None:
    with pytest.raises(BackendMisconfigured, match=option):
        async with backend(server, **{option: value}):
            pass


@pytest.mark.parametrize("name", ["vllm-served", "tensorrt_llm-served"])
def test_an_option_that_a_fleet_has_not_or_lacks_is_named_before_it_is_made(name: str) -> None:
    with pytest.raises(BackendMisconfigured, match=r"no option 'modle'.*: model, decode"):
        load_backend(name, {"modle": "x", "decode": "http://127.0.0.1:9"})
    with pytest.raises(BackendMisconfigured, match="needs the option 'decode'"):
        load_backend(name, {"model": "x"})


@pytest.mark.parametrize(
    ("option", "value"), [("capacity_tokens", 0), ("max_batch", 0), ("context_tokens", -1)]
)
async def test_a_number_that_is_none_is_refused_by_name(server, option, value) -> None:
    with pytest.raises(BackendMisconfigured, match=option):
        async with backend(server, **{option: value}):
            pass


@pytest.mark.parametrize("models", [{"of": "another form"}, [{"name": "m"}], [{"id": "m"}]])
async def test_a_server_of_another_kind_is_named(server, models) -> None:
    server.models = models
    with pytest.raises(BackendMisconfigured, match=server.address):
        async with backend(server):
            pass


async def test_a_pair_is_asked_as_its_own_router_asks_it(server, other) -> None:
    async with backend(server, other) as (made, told):
        made.decode(job(generated=[5], salt=b"\x0a"))
        await told.until(told.end("j"))
    assert (told.text("j"), told.errors) == (TOKENS, {})
    assert told.done["j"][1] == 16
    (first,), (second,) = other.asked, server.asked
    assert (first["max_tokens"], first["kv_transfer_params"]) == (1, ASK)
    assert "stream" not in first
    assert (second["max_tokens"], second["kv_transfer_params"]) == (7, KV)
    for asked in (first, second):
        assert asked["prompt"] == [*range(40, 60), 5]
        assert (asked["model"], asked["cache_salt"]) == ("m", "0a")
        assert asked["stop_token_ids"] == [2]


async def test_one_server_alone_is_asked_once(server) -> None:
    async with backend(server) as (made, told):
        made.decode(job(sampling=Sampling(temperature=0.0, logprobs=1)))
        await told.until(told.end("j"))
    assert len(server.asked) == 1
    assert "kv_transfer_params" not in server.asked[0]
    assert told.tokens["j"][0] == Sampled(31, Logprob(31, -0.5, ((31, -0.5),)))


async def test_prompt_logprobs_come_before_the_first_token(server) -> None:
    async with backend(server) as (made, told):
        made.decode(job(prompt_logprobs=0))
        await told.until(told.end("j"))
    output, _ = told.done["j"]
    assert [one.token for one in output.prompt_logprobs] == list(range(41, 60))
    assert told.text("j") == TOKENS


async def test_an_abort_closes_the_connection_and_others_go_on(server) -> None:
    hold = asyncio.Event()

    async def some(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if body["cache_salt"] != "only slow":
            return None
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"token_ids": [9]}]}\n\n')
        await hold.wait()
        return response

    server.behave = some
    async with backend(server) as (made, told):
        made.decode(job("slow"))
        await told.until(told.first("slow"))
        made.abort("slow")
        made.decode(job("other"))
        await told.until(told.end("slow"))
        await told.until(told.end("other"))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await server.left.acquire()
    assert (told.text("slow"), told.text("other")) == ([9], TOKENS)
    assert told.errors == {}


async def test_an_abort_between_the_two_servers_asks_the_second_nothing(server, other) -> None:
    asked = asyncio.Event()

    async def hang(request: web.Request, body: dict[str, Any]) -> None:
        asked.set()
        await asyncio.Event().wait()

    other.behave = hang
    async with backend(server, other) as (made, told):
        made.decode(job())
        await told.until(asked)
        made.abort("j")
        await told.until(told.end("j"))
    assert (server.asked, told.errors) == ([], {})


async def test_a_server_that_says_nothing_fails_the_job_and_no_other(server) -> None:
    async def hang(request: web.Request, body: dict[str, Any]) -> None:
        if body["cache_salt"] == "only hung":
            await asyncio.Event().wait()

    server.behave = hang
    async with backend(server, silence_seconds=1.0) as (made, told):
        made.decode(job("hung"))
        made.decode(job("other"))
        await told.until(told.end("hung"))
        await told.until(told.end("other"))
    assert server.address in str(told.errors["hung"])
    assert isinstance(told.errors["hung"], BackendError)
    assert told.text("other") == TOKENS


async def cut(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'data: {"choices": [{"token_ids": [9]}]}\n\ndata: {"cho')
    assert request.transport is not None
    request.transport.abort()
    return response


async def unfinished(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b'data: {"choices": [{"token_ids": [9]}]}\n\n')


async def garbage(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b"data: {]\n\n")


async def other_form(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b'data: {"choices": [{}]}\n\n')


async def an_error(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b'data: {"error": "out of luck"}\n\n')


async def refused(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(status=400, text="logprobs: at most 20")


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (cut, "127.0.0.1"),
        (unfinished, "ended before its end"),
        (garbage, "no JSON"),
        (other_form, "another form"),
        (an_error, "out of luck"),
        (refused, "at most 20"),
    ],
)
async def test_what_a_server_does_wrong_fails_the_job_with_the_reason(
    server, behaviour, says
) -> None:
    server.behave = behaviour
    async with backend(server) as (made, told):
        made.decode(job())
        await told.until(told.end("j"))
    assert says in str(told.errors["j"])
    assert isinstance(told.errors["j"], BackendError)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_full_server_is_no_broken_one(server, status) -> None:
    async def full(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status)

    server.behave = full
    async with backend(server) as (made, told):
        made.decode(job())
        await told.until(told.end("j"))
    assert isinstance(told.errors["j"], PoolExhausted)


async def test_a_prefill_server_without_a_connector_is_named(server, other) -> None:
    async def no_kv(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"choices": [{}], "usage": {}, "kv_transfer_params": None})

    other.behave = no_kv
    async with backend(server, other) as (made, told):
        made.decode(job())
        await told.until(told.end("j"))
    assert "has it a connector" in str(told.errors["j"])


async def test_kv_is_neither_given_nor_taken(server) -> None:
    async with backend(server) as (made, _):
        with pytest.raises(BackendError, match="role must be both"):
            made.prefill(PrefillJob(name="p", tokens=[1]))
        with pytest.raises(BackendError, match="role must be both"):
            made.decode(job(blocks=(1,)))


async def test_the_context_is_that_of_the_shorter_server(server, other) -> None:
    other.models = [{"id": "x", "max_model_len": 7}, {"id": "m", "max_model_len": 70}]
    async with backend(server, other) as (made, _):
        assert made.info.context_tokens == 69
        assert (made.info.kind, made.info.engine_blocks) == ("engine", made.info.pool_blocks)


async def test_a_server_of_several_models_needs_a_name(server) -> None:
    server.models = [{"id": "x", "max_model_len": 7}, {"id": "y", "max_model_len": 70}]
    with pytest.raises(BackendMisconfigured, match=f"served_model: {server.address} serves x, y"):
        async with backend(server):
            pass


async def test_a_server_that_is_not_there_is_named() -> None:
    nowhere = FakeServer()
    nowhere.address = "http://127.0.0.1:9"
    with pytest.raises(BackendError, match=r"http://127\.0\.0\.1:9"):
        async with backend(nowhere):
            pass
