"""Stands in for a vLLM server where one that fails, hangs or is slow is wanted.

It says what vLLM 0.32 says, fields that nobody reads left out; `real/test_served.py` asks the
real one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

TOKENS = [31, 32, 33, 34]
KV = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_engine_id": "e"}

Behave = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


class FakeServer:
    """`behave` may answer a request in its place; `left` counts clients that went away."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Semaphore(0)
        self.behave: Behave | None = None
        self.models = [{"id": "m", "max_model_len": 100}]
        self.address = ""

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": self.models})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        try:
            answer = await self.behave(request, body) if self.behave is not None else None
            if answer is not None:
                return answer
            return await (stream(request) if body.get("stream") else whole(body))
        except asyncio.CancelledError:
            self.left.release()
            raise


async def whole(body: dict[str, Any]) -> web.Response:
    scores = [None, *({str(it): {"logprob": -1.5, "rank": 3}} for it in body["prompt"][1:])]
    return web.json_response(
        {
            "choices": [{"token_ids": TOKENS[:1], "prompt_logprobs": scores}],
            "usage": {"prompt_tokens_details": {"cached_tokens": 16}},
            "kv_transfer_params": KV,
        }
    )


async def stream(request: web.Request, tokens: list[int] = TOKENS) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for token in tokens:
        choice = {
            "token_ids": [token],
            "logprobs": {
                "token_logprobs": [-0.5],
                "top_logprobs": [{f"token_id:{token}": -0.5, "token_id:7": -2.0}],
            },
        }
        await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


@asynccontextmanager
async def serving() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.add_routes(
        [web.get("/v1/models", fake.list_models), web.post("/v1/completions", fake.complete)]
    )
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
