"""What surrounds every route: ids, health, metrics, ledger, and bugs."""

import asyncio

import aiohttp
import pytest
from carrier import MODEL, Served, serving
from events import events, finishes
from prometheus_client import CollectorRegistry, Counter

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CHATS = "/v1/chat/completions"


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/health/live"])
@pytest.mark.parametrize("given", ["my-id.1:2_3", "x" * 128])
async def test_a_clients_id_comes_back(http: aiohttp.ClientSession, path: str, given: str):
    async with http.get(path, headers={"X-Request-ID": given}) as answer:
        assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, 'a"b', "a b", "ä", "-"])
async def test_an_id_that_could_do_harm_is_replaced(http: aiohttp.ClientSession, given: str):
    async with http.get("/v1/models", headers={"X-Request-ID": given}) as answer:
        assert answer.headers["x-request-id"] not in ("", given)


async def test_a_stream_names_its_request_too(served: Served, http: aiohttp.ClientSession):
    async with http.post(CHATS, json=CHAT | {"stream": True}) as answer:
        assert answer.headers["x-request-id"] == served.carrier.jobs[0].id


async def test_not_ready_says_why(vocabulary):
    why: list[str | None] = ["Redis does not answer"]
    async with (
        serving(vocabulary, ready=lambda: why[0]) as served,
        aiohttp.ClientSession(served.url) as http,
    ):
        for path in ("/health", "/health/ready"):
            async with http.get(path) as answer:
                assert answer.status == 503
                assert answer.headers["Retry-After"]
                assert (await answer.json())["reason"] == why[0]
        async with http.get("/health/live") as answer:
            assert answer.status == 200
        why[0] = None
        async with http.get("/health/ready") as answer:
            assert answer.status == 200


async def test_metrics_show_the_registry(vocabulary):
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    async with (
        serving(vocabulary, registry=registry) as served,
        aiohttp.ClientSession(served.url) as http,
        http.get("/metrics") as answer,
    ):
        assert answer.content_type == "text/plain"
        assert "things_total 3.0" in await answer.text()


async def test_the_ledger_is_shown(http: aiohttp.ClientSession):
    async with http.get("/debug/ledger") as answer:
        assert await answer.json() == {"balanced": True, "workers": []}


async def test_a_ledger_that_does_not_come_is_given_up(vocabulary):
    async with (
        serving(vocabulary, ledger=asyncio.Event().wait, ledger_seconds=0.05) as served,
        aiohttp.ClientSession(served.url) as http,
        http.get("/debug/ledger") as answer,
    ):
        assert answer.status == 504


async def test_workers_and_pairs_are_shown(http: aiohttp.ClientSession):
    async with http.get("/admin/workers") as answer:
        assert await answer.json() == {"workers": [], "pairs": []}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/debug/ledger", "/admin/workers"])
async def test_what_is_not_public_asks_for_a_key(vocabulary, path: str):
    async with (
        serving(vocabulary, api_keys=frozenset({"k"})) as served,
        aiohttp.ClientSession(served.url) as http,
    ):
        for header in ({}, {"Authorization": "k"}, {"Authorization": "Basic k"}):
            async with http.get(path, headers=header) as answer:
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        async with http.get(path, headers={"Authorization": "bearer k"}) as answer:
            assert answer.status != 401
        for public in ("/health", "/health/live", "/metrics", "/version"):
            async with http.get(public) as answer:
                assert answer.status == 200


async def test_a_request_is_shown_by_its_id(vocabulary):
    known = {"id": "r1", "state": "done"}
    async with (
        serving(vocabulary, request=lambda name: known if name == "r1" else None) as served,
        aiohttp.ClientSession(served.url) as http,
    ):
        async with http.get("/admin/requests/r1") as answer:
            assert await answer.json() == known
        async with http.get("/admin/requests/r2") as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "request_not_found"


async def test_a_worker_is_drained_by_its_name(http: aiohttp.ClientSession):
    async with http.post("/admin/workers/d0/drain") as answer:
        assert answer.status == 202
        assert await answer.json() == {"worker": "d0", "draining": True}
    async with http.post("/admin/workers/x/drain") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "worker_not_found"
    async with http.get("/admin/workers/d0/drain") as answer:
        assert answer.status == 405


ADMIN_PAGES = [
    ("GET", "/debug/ledger", 200),
    ("GET", "/admin/workers", 200),
    ("GET", "/admin/requests/r1", 404),
    ("POST", "/admin/workers/d0/drain", 202),
]


@pytest.mark.parametrize(("method", "path", "well"), ADMIN_PAGES)
@pytest.mark.parametrize(
    ("api_keys", "admin_keys", "shown", "status"),
    [
        ({"t:k"}, {"a"}, "a", 200),
        ({"t:k"}, {"a"}, "k", 403),
        ({"t:k"}, {"a"}, "x", 401),
        ({"t:k"}, {"a"}, "", 401),
        ({"t:k"}, set(), "k", 403),
        (set(), {"a"}, "a", 200),
        (set(), {"a"}, "k", 403),
        (set(), {"a"}, "", 401),
        (set(), set(), "", 200),
    ],
)
async def test_what_shows_all_tenants_needs_an_administrators_key(
    vocabulary,
    method: str,
    path: str,
    well: int,
    api_keys: set[str],
    admin_keys: set[str],
    shown: str,
    status: int,
):
    header = {"Authorization": f"Bearer {shown}"} if shown else {}
    async with (
        serving(
            vocabulary, api_keys=frozenset(api_keys), admin_keys=frozenset(admin_keys)
        ) as served,
        aiohttp.ClientSession(served.url) as http,
        http.request(method, path, headers=header) as answer,
    ):
        assert answer.status == (well if status == 200 else status)
        if status == 403:
            assert "admin_keys" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize("path", [CHATS, "/v1/completions", "/tokenize", "/detokenize"])
async def test_without_a_key_a_body_is_not_even_read(vocabulary, path: str):
    async with (
        serving(vocabulary, api_keys=frozenset({"k"})) as served,
        aiohttp.ClientSession(served.url) as http,
        http.post(path, data=b"{") as answer,
    ):
        assert answer.status == 401


async def test_a_bug_is_logged_and_not_told(served: Served, http: aiohttp.ClientSession):
    served.carrier.failures[0] = RuntimeError("a secret")
    async with http.post(CHATS, json=CHAT) as answer:
        assert answer.status == 500
        assert "secret" not in await answer.text()
    assert served.observed[-1]["status"] == 500


async def test_a_bug_in_a_stream_never_looks_like_an_end(
    served: Served, http: aiohttp.ClientSession
):
    served.carrier.failures[3] = RuntimeError("a secret")
    *chunks, last = await events(http, CHATS, **CHAT)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in str(last)
    assert finishes(chunks) == []
    assert served.observed[-1]["status"] == 500


async def test_every_request_is_observed_once(served: Served, http: aiohttp.ClientSession):
    for body in (CHAT, CHAT | {"stream": True}, CHAT | {"n": 0}, b"nothing"):
        how = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with http.post(CHATS, **how) as answer:
            await answer.read()
    async with http.get("/v1/models/a/b"), http.get("/" + "x" * 3000):
        pass
    seen = [(one["route"], one["status"]) for one in served.observed]
    assert sorted(seen) == sorted(
        [*[(CHATS, 200)] * 2, *[(CHATS, 400)] * 2, ("/v1/models/{name}", 404), ("unknown", 404)]
    )
    whole, stream = served.observed[:2]
    for one in (whole, stream):
        assert one["timeline"].decode_worker == "d0"
        assert one["completion_tokens"] == len(served.carrier.tokens) + 1
        assert one["seconds_to_first_token"] > 0
    assert served.observed[2]["timeline"] is None
