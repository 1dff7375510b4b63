"""Everything that can end a request badly; `api/errors.py` has the answer for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.resume.claim import Claim

from gateway.quota import Quota


class GatewayError(Exception):
    """A request could not be answered as asked.

    `retry_after` says in seconds when trying again may help, where that is known better than from
    the class; `quota` what is left to the tenant.
    """

    retry_after: float | None = None
    quota: Quota | None = None


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


class RequestNotFound(BadRequest):
    """This gateway knows of no such request, or not any more. Another gateway may."""


class BodyTooLarge(BadRequest):
    """The body exceeds the limit. The client's fault."""


class Unauthorized(GatewayError):
    """No key, or a wrong one. The client's fault."""


class Forbidden(GatewayError):
    """The key does not open this page. The client's fault, or the operator's who has set none."""


class QueueFull(GatewayError):
    """Too many requests are waiting. Trying later helps."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TenantOverLimit(GatewayError):
    """The tenant has used up what it may. Trying after `retry_after` seconds helps."""

    def __init__(self, tenant: str, retry_after: float, quota: Quota) -> None:
        super().__init__(f"{tenant} has reached its limit; try again in {retry_after:.3g} s")
        self.retry_after = retry_after
        self.quota = quota


class RequestUnknown(BadRequest):
    """No such request of this tenant is known (any more). Asking for it again changes nothing."""


class KeyReused(BadRequest):
    """The idempotency key is that of another request. The client's fault."""


class ContinuationLost(GatewayError):
    """Tokens that the client has are known to nobody any more, and cannot be computed again alike.

    Asking for the rest changes nothing.
    """


class Repeated(GatewayError):
    """The request is not new; whoever catches this goes on with `claim`, which is theirs now."""

    def __init__(self, claim: Claim) -> None:
        super().__init__("the request was made before")
        self.claim = claim


class TakenOver(GatewayError):
    """The request goes on elsewhere: somebody has asked for it again. Nothing is lost."""

    def __init__(self, request: str) -> None:
        super().__init__(f"{request} goes on on another connection")


class QueueUnavailable(GatewayError):
    """Redis does not answer. Trying later helps."""


class NoWorkers(GatewayError):
    """No pair of workers can take this request. Trying later helps."""


class Draining(GatewayError):
    """This gateway is shutting down. Another one, or trying later, helps."""


class DeadlineExceeded(GatewayError):
    """The request's time was up; `phase` says what it was waiting for.

    `foreseen` is why it would have been, when it was not waited for.
    """

    def __init__(self, phase: str, foreseen: str = "") -> None:
        if foreseen:
            super().__init__(f"the request cannot keep its deadline: {foreseen}")
        else:
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
