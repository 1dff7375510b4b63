"""A router in front of a stock prefill and decode server, as vLLM's examples have one.

    python -m tests.vllm_engine.router PORT PREFILL DECODE

It asks the prefill server for one token, passes on what that says of its KV, and passes through
what the decode server streams. It neither queues nor retries.
"""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
from aiohttp import web

from backends.vllm.served import ASK, PATH


class Router:
    """Two servers."""

    def __init__(self, prefill: str, decode: str) -> None:
        self.prefill = prefill
        self.decode = decode
        self.session: aiohttp.ClientSession | None = None

    async def open(self, app: web.Application) -> Any:
        limits = aiohttp.ClientTimeout(total=None, sock_read=600)
        async with aiohttp.ClientSession(timeout=limits) as self.session:
            yield

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        assert self.session is not None
        body = await request.json()
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK}
        async with self.session.post(self.prefill + PATH, json=first) as answer:
            answer.raise_for_status()
            body["kv_transfer_params"] = (await answer.json())["kv_transfer_params"]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        async with self.session.post(self.decode + PATH, json=body) as answer:
            answer.raise_for_status()
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
        return response


def main() -> None:
    port, prefill, decode = sys.argv[1:]
    router = Router(prefill, decode)
    app = web.Application()
    app.cleanup_ctx.append(router.open)
    app.add_routes([web.get("/health/ready", router.healthy), web.post(PATH, router.complete)])
    web.run_app(app, host="127.0.0.1", port=int(port), print=None)


if __name__ == "__main__":
    main()
