"""Keys, limits and a lost Redis, as clients and operators of a whole Baton meet them."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support.patience import PATIENCE_SECONDS

from .site import Site, serve, synthetic

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Any) -> Iterator[Site]:
    redis = {"timeout_seconds": 2 * PATIENCE_SECONDS, "outage_seconds": 2 * PATIENCE_SECONDS}
    with serve(tmp_path, {"workers": synthetic(), "redis": redis}) as one:
        yield one


def ask(site: Site, key: str = "") -> tuple[int, Mapping[str, str]]:
    body = {"model": site.model, "prompt": "x", "max_tokens": 4}
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    request = Request(f"{site.url}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=4 * PATIENCE_SECONDS) as answer:
            return answer.status, answer.headers
    except HTTPError as error:
        return error.code, error.headers


def keys(site: Site, *words: str) -> str:
    program = [sys.executable, "-m", "gateway.cli", "keys", *words]
    where = ["--config", str(site.folder / "baton.toml")]
    done = subprocess.run(
        [*program, *where], capture_output=True, text=True, timeout=4 * PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_key_lets_in_as_much_as_its_tenant_may_until_it_is_revoked(site: Site) -> None:
    assert ask(site)[0] == 200
    made = keys(site, "add", "ann", "--requests", "3")
    key, key_id = made.split()[0], made.split(" id ")[1].split(".")[0]
    site.until(lambda: ask(site)[0] == 401)
    statuses, told = [], {}
    for _ in range(4):
        status, told = ask(site, key)
        statuses.append(status)
        if status == 200:
            assert told["x-ratelimit-limit-requests"] == "3"
    assert statuses == [200, 200, 200, 429]
    assert told["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(told["Retry-After"]) <= 20
    keys(site, "revoke", key_id)
    site.until(lambda: ask(site, key)[0] == 200)  # none is left, so that none is asked for


def test_while_redis_is_dead_new_requests_are_told_at_once_and_streams_go_on(site: Site) -> None:
    body = {"model": site.model, "prompt": "x", "max_tokens": 400, "stream": True}
    with urlopen(site.post("/v1/completions", body), timeout=4 * PATIENCE_SECONDS) as stream:
        first = stream.readline()
        assert first.startswith(b"data: ")
        site.kill("redis")
        site.until(lambda: site.events("gateway", "redis.lost"))
        began = time.monotonic()
        status, told = ask(site)
        assert status in (200, 503)  # it may be back already
        if status == 503:
            assert time.monotonic() - began < PATIENCE_SECONDS  # what waits does so for longer
            assert int(told["Retry-After"]) >= 1
        rest = stream.read()
    assert b"[DONE]" in rest
    assert b'"finish_reason":"length"' in rest
    site.until(lambda: ask(site)[0] == 200)
