"""Everything that can end a request badly; `api/errors.py` has the answer for each."""

from __future__ import annotations


class GatewayError(Exception):
    """A request could not be answered as asked."""


class BadRequest(GatewayError):
    """The client asked for something impossible or unsupported; `field` says where.

    Asking again changes nothing.
    """

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class PromptTooLong(BadRequest):
    """Prompt and wanted tokens exceed the context. The client's fault."""


class ModelNotFound(BadRequest):
    """No such model is served here. The client's fault."""


class NoSuchWorker(BadRequest):
    """No worker of that name is connected. The administrator's mistake."""


class BodyTooLarge(BadRequest):
    """The body exceeds the limit. The client's fault."""


class Unauthorized(GatewayError):
    """No key, or a wrong one. The client's fault."""


class Forbidden(GatewayError):
    """The key does not open this page. The client's fault, or the operator's who has set none."""


class QueueFull(GatewayError):
    """Too many requests are waiting. Trying later helps."""


class QueueUnavailable(GatewayError):
    """Redis does not answer. Trying later helps."""


class NoWorkers(GatewayError):
    """No pair of workers can take this request. Trying later helps."""


class Draining(GatewayError):
    """This gateway is shutting down. Another one, or trying later, helps."""


class DeadlineExceeded(GatewayError):
    """The request's time was up; `phase` says what it was waiting for."""

    def __init__(self, phase: str) -> None:
        super().__init__(f"the request's deadline passed while it was {phase}")
        self.phase = phase


class WorkerFailed(GatewayError):
    """Workers failed and no other could finish the answer; names phase, peer and cause."""

    def __init__(self, phase: str, worker: str, cause: str) -> None:
        super().__init__(f"{phase} on {worker} failed: {cause}")
        self.phase = phase
        self.worker = worker
        self.cause = cause


class SlowClient(GatewayError):
    """The client did not read its stream; it is disconnected."""
