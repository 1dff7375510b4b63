"""A `trtllm-serve` that says what `exchanges.json` has, and refuses unknown fields."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

EXCHANGES = json.loads((Path(__file__).parent / "exchanges.json").read_text())


def filled(told: Any, number: Any) -> Any:
    """An exchange with the number that the client chose in its places."""
    return json.loads(json.dumps(told).replace('"$ID"', json.dumps(number)))


class FakeServe:
    """Answers with the exchanges of these names; `hold`, while it is set, keeps it silent."""

    def __init__(self, release: str) -> None:
        self.context, self.generation = "context", "generation"
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Semaphore(0)
        self.hold: asyncio.Event | None = None
        self.address = ""
        self.lacks: set[str] = set()
        self._fields = {name: set(it[release]) for name, it in EXCHANGES["fields"].items()}

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(EXCHANGES["models"])

    async def schema(self, request: web.Request) -> web.Response:
        schemas = {
            name: {"properties": {key: {} for key in fields - self.lacks}}
            for name, fields in self._fields.items()
        }
        return web.json_response({"components": {"schemas": schemas}})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        given = body.get("disaggregated_params") or {}
        for name, record in (("CompletionRequest", body), ("DisaggregatedParams", given)):
            if unknown := record.keys() - self._fields[name]:
                return web.json_response({"detail": f"extra: {sorted(unknown)}"}, status=400)
        name = self.context if given.get("request_type") == "context_only" else self.generation
        told = filled(EXCHANGES[name], given.get("disagg_request_id"))
        try:
            return await self._answer(request, told)
        except asyncio.CancelledError:
            self.left.release()
            raise

    async def _answer(self, request: web.Request, told: Any) -> web.StreamResponse:
        if self.hold is not None:
            await self.hold.wait()
        if isinstance(told["response"], dict):
            return web.json_response(self._known(told["response"]), status=told.get("status", 200))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in told["response"]:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _known(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer without the fields that the release does not have."""
        for choice in answer.get("choices", ()):
            given = choice["disaggregated_params"]
            if given is not None:
                names = given.keys() & self._fields["DisaggregatedParams"]
                choice["disaggregated_params"] = {name: given[name] for name in names}
        return answer


@asynccontextmanager
async def serving(release: str = "1.3") -> AsyncIterator[FakeServe]:
    fake = FakeServe(release)
    app = web.Application()
    app.add_routes(
        [
            web.get("/v1/models", fake.models),
            web.get("/openapi.json", fake.schema),
            web.post("/v1/completions", fake.complete),
        ]
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
