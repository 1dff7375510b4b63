"""Put the HTTP side together: routes, and what surrounds every one of them.

Run the application with `handler_cancellation=True`: a client that leaves must cancel its
handler, as that is what frees everything its request holds.
"""

from __future__ import annotations

import re
import secrets

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from structlog.contextvars import bind_contextvars

from gateway.api.endpoints import JOB, QUOTA, TALLY, Endpoints
from gateway.api.errors import code_of, error_response, http_response, internal_error
from gateway.api.limits import quota_headers
from gateway.api.pages import Pages
from gateway.api.service import Service
from gateway.api.tally import Tally
from gateway.errors import GatewayError

log = structlog.get_logger()

NAME = web.RequestKey("name", str)
REQUEST_ID = "x-request-id"
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
UNKNOWN_ROUTE = "unknown"


def build_app(service: Service) -> web.Application:
    """The application that serves `service`."""
    # bodies are bounded in `body.py`, before they are read
    app = web.Application(middlewares=[_around(service)], client_max_size=0)
    endpoints, pages = Endpoints(service), Pages(service)
    app.on_response_prepare.append(_name)
    app.router.add_post("/v1/chat/completions", endpoints.chat)
    app.router.add_post("/v1/completions", endpoints.completion)
    app.router.add_post("/tokenize", endpoints.tokenize)
    app.router.add_post("/detokenize", endpoints.detokenize)
    app.router.add_post("/admin/workers/{id}/drain", pages.drain)
    for path, page in (
        ("/v1/models", pages.models),
        ("/v1/models/{name:.+}", pages.model),
        ("/health", pages.ready),
        ("/health/live", pages.live),
        ("/health/ready", pages.ready),
        ("/metrics", pages.metrics),
        ("/debug/ledger", pages.ledger),
        ("/admin/workers", pages.workers),
        ("/admin/requests/{id}", pages.request),
        ("/version", pages.version),
    ):
        app.router.add_get(path, page)
    return app


async def _name(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer says whose it is, and what is left to its tenant.

    Its name is the client's, if that may stand in a header and a log.
    """
    response.headers["Server"] = "baton"
    response.headers[REQUEST_ID] = request.get(NAME) or _request_id(request, secrets.token_hex(16))
    quota = request.get(QUOTA)
    if quota is not None:
        response.headers.update(quota_headers(quota))


def _request_id(request: web.Request, otherwise: str) -> str:
    given = request.headers.get(REQUEST_ID, "")
    return given if SAFE_ID.fullmatch(given) else otherwise


def _around(service: Service) -> Middleware:
    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Give the request its names, answer whatever it raises, and report it when it is over."""
        job = request[JOB] = secrets.token_hex(16)
        request[NAME] = _request_id(request, job)
        bind_contextvars(request=job)  # the server gives every request a context of its own
        resource = request.match_info.route.resource
        tally = request[TALLY] = Tally(resource.canonical if resource else UNKNOWN_ROUTE)
        try:
            return await _answered(request, handler, tally)
        finally:
            tally.report(service.observe)

    return around


async def _answered(request: web.Request, handler: Handler, tally: Tally) -> web.StreamResponse:
    try:
        response = await handler(request)
    except GatewayError as error:
        response = error_response(error)
        if error.quota is not None:
            request[QUOTA] = error.quota
        level = "warning" if response.status >= 500 else "info"
        getattr(log, level)("request.refused", code=code_of(error), error=str(error))
    except web.HTTPException as error:
        response = http_response(error, request.path)
    except ConnectionError:
        raise  # the client has left; the server knows what to do
    except Exception:  # a bug: this is the edge, where it is logged and must have an answer
        log.exception("request.broke")
        tally.status = 500
        if request.writer.output_size:
            if request.transport is not None:
                request.transport.abort()  # too late for words, and it must not look complete
            raise
        response = error_response(internal_error())
    if not response.prepared:
        tally.status = response.status
    return response
