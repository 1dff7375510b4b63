"""What clients hear of their tenant's limits, and say of their own patience."""

import asyncio

import aiohttp
import pytest
from carrier import MODEL, Served, serving

from gateway.admission import Terms
from gateway.api.limits import duration, quota_headers
from gateway.errors import QueueFull, TenantOverLimit
from gateway.quota import Allowance, Quota
from gateway.tenants import Keyring, Tenant
from tests.support.patience import PATIENCE_SECONDS

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CHATS = "/v1/chat/completions"
QUOTA = Quota(
    requests=Allowance(60, 59, 1.0),
    prefill=Allowance(1000, 900, 6.0),
    decode=Allowance(500, 20, 57.6),
)
TOLD = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-limit-tokens": "500",
    "x-ratelimit-remaining-tokens": "20",
    "x-ratelimit-reset-tokens": "57.6s",
}


def limits(answer: aiohttp.ClientResponse) -> dict[str, str]:
    names = (name for name in answer.headers if name.lower().startswith("x-ratelimit"))
    return {name.lower(): answer.headers[name] for name in names}


@pytest.mark.parametrize("stream", [False, True])
async def test_good_answers_tell_what_is_left(
    served: Served, http: aiohttp.ClientSession, stream: bool
):
    async def tell(step: int) -> None:
        served.carrier.jobs[-1].told(QUOTA)

    served.carrier.before = tell
    async with http.post(CHATS, json=CHAT | {"stream": stream}) as answer:
        assert answer.status == 200
        assert limits(answer) == TOLD


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tenant_over_its_limit_gets_429_before_any_header_of_a_stream(
    served: Served, http: aiohttp.ClientSession, stream: bool
):
    served.carrier.failures[0] = TenantOverLimit("ann", 12.3, QUOTA)
    async with http.post(CHATS, json=CHAT | {"stream": stream}) as answer:
        assert answer.status == 429
        assert answer.headers["Retry-After"] == "13"
        assert answer.headers["retry-after-ms"] == "12300"
        assert limits(answer) == TOLD
        error = (await answer.json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


async def test_a_full_queue_gets_503_with_the_time_that_it_estimates(
    served: Served, http: aiohttp.ClientSession
):
    served.carrier.failures[0] = QueueFull("1 requests are waiting already", retry_after=7.0)
    async with http.post(CHATS, json=CHAT | {"stream": True}) as answer:
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "7"


async def test_no_limit_is_no_header(http: aiohttp.ClientSession):
    async with http.post(CHATS, json=CHAT) as answer:
        assert limits(answer) == {}
    assert quota_headers(Quota(prefill=Allowance(10, 1, 0.25))) == {
        "x-ratelimit-limit-tokens": "10",
        "x-ratelimit-remaining-tokens": "1",
        "x-ratelimit-reset-tokens": "250ms",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (7.5, "7.5s"), (59.9999, "1m0s"), (361, "6m1s")],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str):
    assert duration(seconds) == text


async def test_a_client_s_patience_is_its_deadline(served: Served, http: aiohttp.ClientSession):
    for given, seconds in (("1500", 1.5), ("80000000", 600.0)):
        now = asyncio.get_running_loop().time()
        async with http.post(CHATS, json=CHAT, headers={"X-Request-Timeout-Ms": given}) as answer:
            assert answer.status == 200
        left = served.carrier.jobs[-1].deadline - now
        assert seconds <= left < seconds + PATIENCE_SECONDS


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "9" * 13, "٣", ""])
async def test_a_patience_that_is_no_number_is_refused_by_name(
    http: aiohttp.ClientSession, given: str
):
    headers = {"X-Request-Timeout-Ms": given.encode().decode("latin-1")}
    async with http.post(CHATS, json=CHAT, headers=headers) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] == "x-request-timeout-ms"


async def test_a_request_stands_in_the_queue_on_its_tenant_s_terms(vocabulary):
    ring = Keyring({"k": "ann"}, trusting=True, elsewhere=False)
    ring._tenants["ann"] = Tenant(name="ann", priority=3, terms=Terms(weight=2.0))
    headers = {"Authorization": "Bearer k"}
    async with (
        serving(vocabulary, keyring=ring) as served,
        aiohttp.ClientSession(served.url, headers=headers) as http,
    ):
        two = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 2}
        for body, priorities in ((two, [3, 3]), (two | {"priority": -1}, [-1, -1])):
            async with http.post("/v1/completions", json=body) as answer:
                assert answer.status == 200
            jobs = served.carrier.jobs[-2:]
            assert {job.tenant for job in jobs} == {"ann"}
            assert [job.terms.weight for job in jobs] == [2.0, 2.0]
            assert sorted(job.counts for job in jobs) == [False, True]
            assert [job.priority for job in jobs] == priorities
