"""What a newcomer does: the default configuration, the real model, the official client."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.site import Site, serve

pytestmark = pytest.mark.slow

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("chat")
    with serve(folder, {}) as running:
        yield running


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=site.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_chat_is_answered_through_two_workers(site: Site, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=site.model, messages=QUESTION, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    (finished,) = site.events("gateway", "request.finished")
    assert (finished["prefill_worker"], finished["decode_worker"]) == ("prefill", "decode")
    (handed,) = site.events("prefill", "handoff.committed")
    numbers = answer.usage.prompt_tokens * LAYERS * 2 * KV_HEADS * HEAD_DIM
    assert handed["bytes"] == numbers * 2
    assert site.balanced()


def test_the_pair_shows_that_its_engines_have_unlike_weights(site: Site) -> None:
    _, seen = site.request("/admin/workers")
    (pair,) = seen["pairs"]
    assert (pair["prefill"], pair["decode"]) == ("prefill", "decode")
    assert pair["unlike_weights"] is True


def test_a_stream_says_the_same(site: Site, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=site.model, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=site.model,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_errors_are_the_clients_own(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=site.model, messages=[], temperature=0)
    assert caught.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=QUESTION)


def test_a_seed_repeats_three_unlike_answers(site: Site, client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.completions.create(
            model=site.model, prompt="Once upon a time", n=3, seed=11, max_tokens=12, temperature=1
        )
        return [choice.text for choice in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first
