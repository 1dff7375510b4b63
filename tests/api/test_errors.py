"""Every error has its answer."""

from collections.abc import Iterator

import msgspec
import pytest

from gateway import errors
from gateway.api.errors import ANSWERS, answer_for, error_json, error_response
from gateway.quota import Quota


def tree(kind: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


EXAMPLES = {
    errors.DeadlineExceeded: errors.DeadlineExceeded("queued"),
    errors.WorkerFailed: errors.WorkerFailed("decode", "d0", "it died"),
    errors.TenantOverLimit: errors.TenantOverLimit("ann", 12.5, Quota()),
}


@pytest.mark.parametrize("kind", list(tree(errors.GatewayError)), ids=lambda kind: kind.__name__)
def test_every_error_has_an_answer_of_its_own(kind: type[errors.GatewayError]):
    assert kind in ANSWERS
    error = EXAMPLES.get(kind) or kind("what happened")
    answer = answer_for(error)
    told = msgspec.json.decode(error_json(error))["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert (told["message"], told["code"]) == (str(error), answer.code)
    response = error_response(error)
    assert response.status == answer.status
    if answer.status in (429, 503):
        assert 0 < int(response.headers["Retry-After"]) <= 60
    if answer.status == 504:
        assert response.headers["x-should-retry"] == "false"


def test_a_child_without_an_answer_gets_its_parents():
    class Odd(errors.NoWorkers):
        """An error that somebody adds."""

    try:
        assert answer_for(Odd("x")) == ANSWERS[errors.NoWorkers]
    finally:
        del Odd


def test_a_bad_request_names_field_and_code():
    told = msgspec.json.decode(error_json(errors.BadRequest("no", field="n", code="too_big")))
    assert told["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "n",
        "code": "too_big",
    }
