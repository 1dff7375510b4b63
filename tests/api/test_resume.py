"""A client that asks again gets what it has not got yet, whatever event it got last."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from carrier import MODEL, SAID, Served, serving

from gateway.api.progress import Progress
from gateway.errors import BadRequest, KeyReused, Repeated, RequestUnknown
from gateway.resume import Answer, Claim, Retention, Saved
from gateway.text import Vocabulary


class Shelf:
    """Records in this process: what `Records` keeps in Redis."""

    retention = Retention()

    def __init__(self) -> None:
        self.saved: dict[str, tuple[str, Saved]] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.answers: list[Answer] = []
        self.dropped: list[str] = []
        self.open_claims: set[Claim] = set()

    def open(self, tenant: str, key: str, saved: Saved, *, seconds: float) -> Claim:
        claim = self._claim(saved, resumed=False)
        known = self.keys.get((tenant, key)) if key else None
        if known is None:
            self.saved[saved.id] = tenant, saved
            self.keys[tenant, key] = saved.id
            claim.opened(None)
        elif self.saved[known][1].body != saved.body:
            claim.opened(KeyReused("another body", field="Idempotency-Key"))
        else:
            claim.opened(Repeated(self._claim(self.saved[known][1], resumed=True)))
        return claim

    async def take(self, tenant: str, request: str, *, body: str = "") -> Claim:
        owner, saved = self.saved.get(request, ("", None))
        if saved is None or owner != tenant:
            raise RequestUnknown("unknown", field="Last-Event-ID")
        return self._claim(saved, resumed=True)

    def settle(self, claim: Claim, answer: Answer, releases: Any) -> None:
        self.answers.append(answer)

    def drop(self, claim: Claim) -> None:
        self.dropped.append(claim.id)

    def close(self, claim: Claim) -> None:
        self.open_claims.discard(claim)

    def _claim(self, saved: Saved, *, resumed: bool) -> Claim:
        records: Any = self
        claim = Claim(records, saved, epoch=1, left=60.0, resumed=resumed)
        self.open_claims.add(claim)
        return claim


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
async def served(vocabulary: Vocabulary, shelf: Shelf) -> AsyncIterator[Served]:
    keys = frozenset({"a:key-a", "b:key-b"})
    async with serving(vocabulary, records=shelf, api_keys=keys) as one:
        yield one
        assert one.carrier.running == 0
        assert not shelf.open_claims


@pytest.fixture
async def http(served: Served) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": "Bearer key-a"}
    async with aiohttp.ClientSession(served.url, headers=headers) as session:
        yield session


class Event:
    def __init__(self, raw: str) -> None:
        lines = raw.split("\n")
        self.id = next((line[4:] for line in lines if line.startswith("id: ")), "")
        self.data = next(line[6:] for line in lines if line.startswith("data: "))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and (self.id, self.data) == (other.id, other.data)

    def __repr__(self) -> str:
        return f"{self.id} {self.data}"


def events_of(text: str) -> list[Event]:
    assert text.endswith("\n\n")
    return [Event(raw) for raw in text[:-2].split("\n\n")]


async def post(
    http: aiohttp.ClientSession, path: str, body: Any, **headers: str
) -> tuple[int, str]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.post(path, json=body, headers=names) as answer:
        return answer.status, await answer.text()


CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
STYLES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"n": 3, "stream_options": {"include_usage": True}}),
    (CHAT, {"stop": ["🙃", "d."], "n": 2}),
    (CHAT, {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
    (CHAT, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    (CHAT, {"max_tokens": 1}),
    (COMPLETION, {"prompt": ["one", "and two"], "n": 2, "stream_options": {"include_usage": True}}),
    (COMPLETION, {"prompt": "say", "echo": True, "logprobs": 2}),
    (COMPLETION, {"prompt": "say", "echo": True, "max_tokens": 0, "logprobs": 1}),
    (COMPLETION, {"prompt": "say", "return_token_ids": True, "stop": "there, "}),
]


def body_of(path: str, **more: Any) -> dict[str, Any]:
    start: dict[str, Any] = {"model": MODEL, "stream": True, "max_tokens": 40}
    if path == CHAT:
        start["messages"] = [{"role": "user", "content": "Hi"}]
    return {**start, **more}


@pytest.mark.parametrize(("path", "more"), STYLES)
async def test_after_whatever_event_the_rest_comes_and_nothing_twice(
    http: aiohttp.ClientSession, path: str, more: dict[str, Any]
) -> None:
    body = body_of(path, **more)
    status, text = await post(http, path, body, Idempotency_Key="k")
    assert status == 200
    whole = events_of(text)
    assert whole[-1].data == "[DONE]"
    assert all(event.id for event in whole[:-1])
    for place, event in enumerate(whole[:-1]):
        status, text = await post(http, path, body, Last_Event_ID=event.id)
        assert status == 200
        assert events_of(text) == whole[place + 1 :]
    assert events_of((await post(http, path, body, Idempotency_Key="k"))[1]) == whole


async def test_the_last_event_alone_is_enough(http: aiohttp.ClientSession) -> None:
    _, text = await post(http, CHAT, body_of(CHAT), Idempotency_Key="k")
    whole = events_of(text)
    async with http.post(CHAT, headers={"Last-Event-ID": whole[2].id}) as answer:
        assert answer.status == 200
        assert events_of(await answer.text()) == whole[3:]


async def test_an_ordinary_stream_has_no_ids_and_no_record(
    http: aiohttp.ClientSession, shelf: Shelf
) -> None:
    _, text = await post(http, CHAT, body_of(CHAT))
    assert "id:" not in text.replace('"id":', "")
    assert not shelf.saved


async def test_every_stream_has_ids_where_that_is_set(vocabulary: Vocabulary, shelf: Shelf) -> None:
    async with (
        serving(vocabulary, records=shelf, every_stream=True) as one,
        aiohttp.ClientSession(one.url) as http,
    ):
        _, text = await post(http, CHAT, body_of(CHAT))
        whole = events_of(text)
        _, text = await post(http, CHAT, body_of(CHAT), Last_Event_ID=whole[3].id)
        assert events_of(text) == whole[4:]
        await post(http, CHAT, body_of(CHAT, stream=False))
        assert len(shelf.saved) == 1


async def test_an_answer_in_one_piece_is_the_same_again(
    http: aiohttp.ClientSession, shelf: Shelf, served: Served
) -> None:
    body = body_of(CHAT, stream=False, n=2, logprobs=True)
    first = await post(http, CHAT, body, Idempotency_Key="k")
    assert first == await post(http, CHAT, body, Idempotency_Key="k")
    assert first[0] == 200
    seeds = {job.seeds for job in served.carrier.jobs}
    assert len(seeds) == 1, "the second time other seeds were drawn"
    assert [job.claim.resumed for job in served.carrier.jobs if job.claim] == [False, True]


async def test_another_tenant_finds_nothing(http: aiohttp.ClientSession) -> None:
    _, text = await post(http, CHAT, body_of(CHAT), Idempotency_Key="k")
    event = events_of(text)[1].id
    stranger = {"Authorization": "Bearer key-b"}
    status, text = await post(http, CHAT, body_of(CHAT), Last_Event_ID=event, **stranger)
    assert (status, json.loads(text)["error"]["code"]) == (404, "request_unknown")
    status, _ = await post(http, CHAT, body_of(CHAT), Last_Event_ID="0" * 32 + "/1")
    assert status == 404
    status, _ = await post(http, COMPLETION, {}, Last_Event_ID=event)
    assert status == 404


async def test_another_body_under_the_same_key_is_refused(http: aiohttp.ClientSession) -> None:
    await post(http, CHAT, body_of(CHAT), Idempotency_Key="k")
    status, text = await post(http, CHAT, body_of(CHAT, n=2), Idempotency_Key="k")
    error = json.loads(text)["error"]
    assert (status, error["code"]) == (422, "idempotency_key_reused")
    assert error["param"] == "Idempotency-Key"


@pytest.mark.parametrize(
    "headers",
    [
        {"Idempotency-Key": ""},
        {"Idempotency-Key": "k" * 256},
        {"Last-Event-ID": "nonsense"},
        {"Last-Event-ID": "0" * 32 + "/"},
        {"Last-Event-ID": "0" * 32 + "/1,,2"},
        {"Last-Event-ID": "0" * 32 + "/1234567890"},
        {"Last-Event-ID": "0" * 31 + "g/1"},
    ],
)
async def test_headers_that_cannot_be_used_are_named(
    http: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    async with http.post(CHAT, json=body_of(CHAT), headers=headers) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["param"] in headers


async def test_an_event_of_a_request_with_other_choices_is_refused(
    http: aiohttp.ClientSession,
) -> None:
    _, text = await post(http, CHAT, body_of(CHAT), Idempotency_Key="k")
    request = events_of(text)[0].id.partition("/")[0]
    status, text = await post(http, CHAT, body_of(CHAT), Last_Event_ID=f"{request}/1,2")
    assert (status, json.loads(text)["error"]["param"]) == (400, "Last-Event-ID")


async def test_a_client_that_says_it_has_more_than_there_is_gets_an_end(
    http: aiohttp.ClientSession,
) -> None:
    _, text = await post(http, CHAT, body_of(CHAT), Idempotency_Key="k")
    request = events_of(text)[0].id.partition("/")[0]
    _, text = await post(http, CHAT, body_of(CHAT), Last_Event_ID=f"{request}/99999")
    (finish, done) = events_of(text)
    assert json.loads(finish.data)["choices"][0]["finish_reason"] == "stop"
    assert done.data == "[DONE]"


async def test_a_client_that_leaves_and_comes_back_misses_nothing(
    http: aiohttp.ClientSession, served: Served
) -> None:
    whole = events_of((await post(http, CHAT, body_of(CHAT), Idempotency_Key="k"))[1])
    served.carrier.before = lambda step: asyncio.sleep(0.01)
    answer = await http.post(CHAT, json=body_of(CHAT), headers={"Idempotency-Key": "k2"})
    raw = b""
    while raw.count(b"\n\n") < 4:
        raw += await answer.content.readany()
    answer.close()
    served.carrier.before = None
    got = events_of(raw[: raw.rindex(b"\n\n") + 2].decode())
    _, text = await post(http, CHAT, body_of(CHAT), Last_Event_ID=got[-1].id)
    everything = [*got, *events_of(text)]
    assert [text_of(event) for event in everything] == [text_of(event) for event in whole]


def text_of(event: Event) -> Any:
    return event.data if event.data == "[DONE]" else json.loads(event.data)["choices"]


async def test_what_failed_before_anything_was_told_is_forgotten(
    http: aiohttp.ClientSession, served: Served, shelf: Shelf
) -> None:
    served.carrier.failures[0] = BadRequest("no worker can", field="top_k")
    status, _ = await post(http, CHAT, body_of(CHAT), Idempotency_Key="k")
    assert status == 400
    assert len(shelf.dropped) == 1
    served.carrier.failures = {3: BadRequest("a worker died")}
    status, text = await post(http, CHAT, body_of(CHAT), Idempotency_Key="k2")
    assert status == 200
    assert '"error"' in text
    assert len(shelf.dropped) == 1


@pytest.mark.parametrize(
    "text", ["0" * 32 + "/-", "f" * 32 + "/0,-,12.,7", "a" * 32 + "/5.+", "0" * 32 + "/0."]
)
def test_an_id_says_what_it_was_made_of(text: str) -> None:
    progress = Progress.parse(text)
    marks = ",".join(map(str, progress.choices))
    assert f"{progress.request}/{marks}{'+' if progress.usage else ''}" == text


def test_what_is_said_here_has_half_characters() -> None:
    assert "🙃" in SAID
