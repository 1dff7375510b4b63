"""From HTTP to text: a client cannot tell whether an engine or a stepped backend answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from gateway.api import Service, build_app
from gateway.cli.model import find_model
from gateway.server import ledgers, workers
from gateway.tenants import Keyring
from gateway.text import Vocabulary, load_text
from tests.engine.desk import clean, engine, start_pair
from tests.life.cluster import Cluster, cluster

SLOW = {"step_seconds": 0.005}
ASKED = {"model": "m", "prompt": "Four score and seven years ago our fathers", "seed": 4, "n": 2}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_text(find_model("bundled"))


@asynccontextmanager
async def door(made: Cluster, vocabulary: Vocabulary) -> AsyncIterator[aiohttp.ClientSession]:
    """The HTTP side in front of a cluster's workers, under the runner that production uses."""
    service = Service(
        carrier=made.relay,
        text=vocabulary,
        models=("m",),
        ready=lambda: None,
        ledger=lambda: ledgers(made.fleet),
        workers=lambda: workers(made.fleet),
        drain=made.fleet.drain,
        request=made.relay.history.find,
        registry=CollectorRegistry(),
        observe=lambda *_, **__: None,
        keyring=Keyring({}, trusting=True, elsewhere=False),
    )
    runner = web.AppRunner(build_app(service), handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession(f"http://{host}:{port}") as http:
            yield http
    finally:
        await runner.cleanup()


async def answer(http: aiohttp.ClientSession, **more: Any) -> Any:
    async with http.post("/v1/completions", json={**ASKED, "max_tokens": 30, **more}) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Any]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


async def streamed(http: aiohttp.ClientSession) -> dict[int, str]:
    texts = {0: "", 1: ""}
    asked = {**ASKED, "max_tokens": 30, "stream": True}
    async with http.post("/v1/completions", json=asked) as response:
        async for event in events(response):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
    return texts


async def test_the_answer_is_that_of_a_stepped_backend(
    redis_url: str, vocabulary: Vocabulary
) -> None:
    seen = []
    for pair in ("stepped stepped", "engine engine", "engine"):
        async with cluster(redis_url) as made:
            await start_pair(made, pair)
            async with door(made, vocabulary) as http:
                whole = await answer(http)
                texts = {it["index"]: it["text"] for it in whole["choices"]}
                reasons = {it["finish_reason"] for it in whole["choices"]}
                assert await streamed(http) == texts
                usage = {key: whole["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
                seen.append((texts, reasons, usage))
            await clean(made)
    assert len(seen[0][0][0]) > 30
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


async def test_the_ledger_shows_what_an_engine_holds_until_the_client_leaves(
    redis_url: str, vocabulary: Vocabulary
) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", **SLOW)
        async with door(made, vocabulary) as http:
            asked = {**ASKED, "max_tokens": 2000, "stream": True}
            async with http.post("/v1/completions", json=asked) as response:
                stream = events(response)
                for _ in range(4):
                    await anext(stream)
                async with http.get("/debug/ledger") as book:
                    (decode,) = [it for it in (await book.json())["workers"] if it["worker"] == "d"]
                assert decode["balanced"]
                held = [it for it in decode["holders"] if it["reason"] == "engine"]
                assert len(held) == 2
                assert all(it["blocks"] > 0 for it in held)
                async with http.get("/admin/workers") as answered:
                    kinds = {it["kind"] for it in (await answered.json())["workers"]}
                assert kinds == {"engine"}
            await asyncio.sleep(0)
            await clean(made, 1.0)


async def test_a_prompt_that_is_to_be_scored_is_refused_by_its_field(
    redis_url: str, vocabulary: Vocabulary
) -> None:
    scored = {**ASKED, "max_tokens": 3, "echo": True, "logprobs": 1, "n": 1}
    async with cluster(redis_url, worker_wait_seconds=0.5) as made:
        await start_pair(made, "engine engine")
        async with door(made, vocabulary) as http:
            async with http.post("/v1/completions", json=scored) as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "echo"
            await made.start("p2", "prefill", backend=engine(prompt_logprobs=True))
            await made.paired(2)
            logprobs = (await answer(http, **scored))["choices"][0]["logprobs"]
            assert logprobs["token_logprobs"][0] is None
            assert all(it is not None for it in logprobs["token_logprobs"][1:])
