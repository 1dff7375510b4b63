"""The answer for everything that can end a request badly.

One table: class, status, OpenAI's `type` and `code`, when to try again. It fills a plain answer
while no header is out, and an event in the stream afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from aiohttp import web

from gateway import errors

JSON = "application/json"


class Answer(NamedTuple):
    """How a class of errors is answered. `retry_after` is in seconds.

    `retry` False keeps SDKs from trying again by themselves.
    """

    status: int
    type: str
    code: str
    retry_after: int | None = None
    retry: bool = True


ANSWERS: Mapping[type[errors.GatewayError], Answer] = {
    errors.GatewayError: Answer(500, "server_error", "internal_error"),
    errors.BadRequest: Answer(400, "invalid_request_error", "invalid_value"),
    errors.PromptTooLong: Answer(400, "invalid_request_error", "context_length_exceeded"),
    errors.ModelNotFound: Answer(404, "invalid_request_error", "model_not_found"),
    errors.NoSuchWorker: Answer(404, "invalid_request_error", "worker_not_found"),
    errors.RequestNotFound: Answer(404, "invalid_request_error", "request_not_found"),
    errors.BodyTooLarge: Answer(413, "invalid_request_error", "request_too_large"),
    errors.Unauthorized: Answer(401, "invalid_request_error", "invalid_api_key"),
    errors.Forbidden: Answer(403, "permission_error", "admin_key_needed"),
    errors.QueueFull: Answer(503, "server_error", "queue_full", retry_after=1),
    errors.TenantOverLimit: Answer(429, "rate_limit_error", "rate_limit_exceeded", retry_after=1),
    errors.RequestUnknown: Answer(404, "invalid_request_error", "request_unknown"),
    errors.KeyReused: Answer(422, "invalid_request_error", "idempotency_key_reused"),
    errors.ContinuationLost: Answer(410, "server_error", "continuation_lost", retry=False),
    errors.Repeated: Answer(409, "invalid_request_error", "request_under_way"),
    errors.TakenOver: Answer(409, "invalid_request_error", "taken_over", retry=False),
    errors.QueueUnavailable: Answer(503, "server_error", "queue_unavailable", retry_after=2),
    errors.NoWorkers: Answer(503, "server_error", "no_workers", retry_after=2),
    errors.Draining: Answer(503, "server_error", "draining", retry_after=2),
    errors.DeadlineExceeded: Answer(504, "server_error", "deadline_exceeded", retry=False),
    errors.WorkerFailed: Answer(502, "server_error", "worker_failed"),
    errors.SlowClient: Answer(408, "invalid_request_error", "client_too_slow", retry=False),
}
HTTP_CODES: Mapping[int, str] = {
    400: "bad_request",
    404: "unknown_url",
    405: "method_not_allowed",
    408: "body_timeout",
    417: "expectation_failed",
}


class Detail(msgspec.Struct, frozen=True):
    """The four fields of OpenAI's error, all always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """What a client gets instead of an answer."""

    error: Detail


def answer_for(error: errors.GatewayError) -> Answer:
    """The row of the error's own class, or the nearest one above."""
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def code_of(error: errors.GatewayError) -> str:
    """The error's own code where it has one, else its class's."""
    own = error.code if isinstance(error, errors.BadRequest) else None
    return own or answer_for(error).code


def error_json(error: errors.GatewayError) -> bytes:
    """The body, which is also the data of an event in a stream."""
    field = error.field if isinstance(error, errors.BadRequest) else None
    detail = Detail(str(error), answer_for(error).type, field, code_of(error))
    return msgspec.json.encode(ErrorBody(detail))


def error_response(error: errors.GatewayError) -> web.Response:
    """A plain answer."""
    answer = answer_for(error)
    response = web.Response(status=answer.status, body=error_json(error), content_type=JSON)
    wait = answer.retry_after if error.retry_after is None else error.retry_after
    if wait is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
        response.headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    if not answer.retry:
        response.headers["x-should-retry"] = "false"
    if answer.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.BodyTooLarge):
        response.force_close()  # the rest of the body is not worth reading
    return response


def http_response(error: web.HTTPException, path: str) -> web.Response:
    """What the router or the server refused, in the same form."""
    if error.status == 404:
        message = f"there is no {path[:256]}"
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{error.method} is not allowed on {path[:256]}; allowed: {allowed}"
    else:
        message = error.text or error.reason
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    code = HTTP_CODES.get(error.status, "http_error")
    body = msgspec.json.encode(ErrorBody(Detail(message, kind, None, code)))
    response = web.Response(status=error.status, body=body, content_type=JSON)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    if error.status == 408:
        response.force_close()
    return response


def internal_error() -> errors.GatewayError:
    """A bug: says nothing of it; the log does."""
    return errors.GatewayError("the gateway failed to answer this request")
