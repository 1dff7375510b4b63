"""What can be asked about the gateway itself: models, health, metrics, ledger, version."""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from gateway.api.errors import JSON
from gateway.api.service import Service
from gateway.errors import DeadlineExceeded, RequestNotFound


class Pages:
    """Handlers over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        self._authorize(request)
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{name}."""
        self._authorize(request)
        self._service.check_model(request.match_info["name"])
        return _json(self._model())

    async def live(self, _: web.Request) -> web.Response:
        """GET /health/live: this process answers."""
        return _json({"status": "live"})

    async def ready(self, _: web.Request) -> web.Response:
        """GET /health/ready: a request would be answered."""
        reason = self._service.ready()
        if reason is None:
            return _json({"status": "ready"})
        response = _json({"status": "not ready", "reason": reason}, status=503)
        response.headers["Retry-After"] = "1"
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        encoder, kind = choose_encoder(request.headers.get("Accept", ""))
        body = encoder(self._service.registry)
        return web.Response(body=body, headers={"Content-Type": kind})

    async def ledger(self, request: web.Request) -> web.Response:
        """GET /debug/ledger: who holds which blocks, on every worker."""
        self._service.check_admin(request.headers.get("Authorization", ""))
        try:
            async with asyncio.timeout(self._service.ledger_seconds):
                return _json(await self._service.ledger())
        except TimeoutError as error:
            raise DeadlineExceeded("asking the workers for their ledgers") from error

    async def workers(self, request: web.Request) -> web.Response:
        """GET /admin/workers: who is connected, and how each pair of them hands over."""
        self._service.check_admin(request.headers.get("Authorization", ""))
        return _json(self._service.workers())

    async def drain(self, request: web.Request) -> web.Response:
        """POST /admin/workers/{id}/drain: answered once the worker has begun to drain."""
        self._service.check_admin(request.headers.get("Authorization", ""))
        worker = request.match_info["id"]
        await self._service.drain(worker)
        return _json({"worker": worker, "draining": True}, status=202)

    async def request(self, request: web.Request) -> web.Response:
        """GET /admin/requests/{id}: where a request of this gateway is or was, and why there."""
        self._service.check_admin(request.headers.get("Authorization", ""))
        name = request.match_info["id"]
        shown = self._service.request(name)
        if shown is None:
            raise RequestNotFound(f"no request `{name[:128]}` is known to this gateway")
        return _json(shown)

    async def version(self, _: web.Request) -> web.Response:
        """GET /version."""
        return _json({"version": self._service.version})

    def _authorize(self, request: web.Request) -> None:
        self._service.tenant(request.headers.get("Authorization", ""))

    def _model(self) -> dict[str, object]:
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._service.started_at,
            "owned_by": "baton",
            "max_model_len": self._service.text.context_tokens,
        }


def _json(value: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type=JSON)
