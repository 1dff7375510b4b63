"""The official Python client, streaming and not, with its typed errors."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from carrier import MODEL, SAID, Served, serving, until

from gateway import errors

CHAT = [{"role": "user", "content": "Say hello."}]


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as one:
        yield one


async def test_a_chat_is_answered(client: openai.AsyncOpenAI, served: Served):
    answer = await client.chat.completions.create(model=MODEL, messages=CHAT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", SAID)
    assert (choice.finish_reason, answer.object, answer.model) == ("stop", "chat.completion", MODEL)
    (job,) = served.carrier.jobs
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(job.prompt)
    assert answer.usage.completion_tokens == len(served.carrier.tokens) + 1
    assert answer.usage.total_tokens == len(job.prompt) + len(served.carrier.tokens) + 1


async def test_a_chat_streams(client: openai.AsyncOpenAI, served: Served):
    stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert [
        chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
    ] == ["stop"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    shown = [chunk for chunk in chunks if chunk.choices[0].delta.content]
    assert any(chunk.choices[0].delta.content == "🙃" for chunk in shown)
    assert all("\ufffd" not in (chunk.choices[0].delta.content or "") for chunk in shown)


async def test_usage_comes_last_when_asked_for(client: openai.AsyncOpenAI, served: Served):
    stream = await client.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(served.carrier.tokens) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_stream_helper_understands_it(client: openai.AsyncOpenAI):
    async with client.chat.completions.stream(model=MODEL, messages=CHAT) as stream:
        said = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(text or "" for text in said) == final.choices[0].message.content == SAID


async def test_a_received_message_can_be_sent_again(client: openai.AsyncOpenAI, served: Served):
    first = await client.chat.completions.create(model=MODEL, messages=CHAT)
    said = first.choices[0].message
    await client.chat.completions.create(
        model=MODEL, messages=[*CHAT, said, {"role": "user", "content": "And?"}]
    )
    await client.chat.completions.create(model=MODEL, messages=[*CHAT, said.model_dump(), *CHAT])
    assert len(served.carrier.jobs) == 3


async def test_several_choices_stream_side_by_side(client: openai.AsyncOpenAI, served: Served):
    stream = await client.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, n=3, seed=7, max_tokens=4
    )
    said = {0: "", 1: "", 2: ""}
    finished = {}
    async for chunk in stream:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
    assert set(said.values()) == {"Hello there, "} or len(set(said.values())) == 1
    assert finished == dict.fromkeys(range(3), "length")
    (job,) = served.carrier.jobs
    assert len(set(job.seeds)) == 3
    await client.chat.completions.create(model=MODEL, messages=CHAT, n=3, seed=7)
    assert served.carrier.jobs[1].seeds == job.seeds
    await client.chat.completions.create(model=MODEL, messages=CHAT, n=1, seed=7)
    assert served.carrier.jobs[2].seeds == job.seeds[:1]


async def test_chat_logprobs_have_their_shape(client: openai.AsyncOpenAI, served: Served):
    wanted = {
        "model": MODEL,
        "messages": CHAT,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 3,
    }
    answer = await client.chat.completions.create(**wanted)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].token == "Hello"
    assert logprobs.content[0].bytes == list(b"Hello")
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.25, -2.0]
    streamed = []
    async for chunk in await client.chat.completions.create(**wanted, stream=True):
        found = chunk.choices[0].logprobs
        streamed += found.content or [] if found else []
    assert streamed == logprobs.content


async def test_a_completion_is_answered_and_streams(client: openai.AsyncOpenAI):
    wanted = {"model": MODEL, "prompt": "Say", "max_tokens": 50}
    answer = await client.completions.create(**wanted)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (SAID, "stop")
    assert answer.object == "text_completion"
    text = ""
    reasons = []
    async for chunk in await client.completions.create(**wanted, stream=True):
        text += chunk.choices[0].text
        reasons.append(chunk.choices[0].finish_reason)
    assert text == SAID
    assert reasons[-1] == "stop"
    assert not any(reasons[:-1])


async def test_prompts_come_in_four_forms(client: openai.AsyncOpenAI, served: Served):
    for prompt in ("a b", ["a b", "c"], [357, 506], [[357, 506], [1116]]):
        await client.completions.create(model=MODEL, prompt=prompt, n=2)
    a_b, c = (served.service.text.encode(text, add_special_tokens=True) for text in ("a b", "c"))
    prompts = [job.prompt for job in served.carrier.jobs]
    assert prompts == [a_b, a_b, c, [357, 506], [357, 506], [1116]]
    assert {job.n for job in served.carrier.jobs} == {2}
    assert len({job.id for job in served.carrier.jobs}) == len(prompts)


async def test_choices_of_several_prompts_are_numbered_through(
    client: openai.AsyncOpenAI, served: Served
):
    answer = await client.completions.create(
        model=MODEL, prompt=["a b", "c"], n=2, max_tokens=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert [text[:3] for text in texts] == ["a b", "a b", "cHe", "cHe"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(job.prompt) for job in served.carrier.jobs)
    assert answer.usage.completion_tokens == 8


async def test_echo_with_logprobs_scores_the_prompt(client: openai.AsyncOpenAI):
    answer = await client.completions.create(
        model=MODEL, prompt="one two three", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("one two three", "length")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["one", " two", " three"]
    assert logprobs.token_logprobs == [None, -0.25, -0.25]
    assert logprobs.text_offset == [0, 3, 7]
    assert logprobs.top_logprobs == [None, {" two": -0.25}, {" three": -0.25}]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


async def test_a_stop_string_ends_the_answer_and_the_work(
    client: openai.AsyncOpenAI, served: Served
):
    for stream in (False, True):
        wanted = {"model": MODEL, "messages": CHAT, "stop": ["o th", "zzz"]}
        if stream:
            chunks = [c async for c in await client.chat.completions.create(**wanted, stream=True)]
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            answer = await client.chat.completions.create(**wanted)
            said = answer.choices[0].message.content or ""
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2
        assert said == "Hell"
    included = await client.chat.completions.create(
        model=MODEL, messages=CHAT, stop="o th", extra_body={"include_stop_str_in_output": True}
    )
    assert included.choices[0].message.content == "Hello th"
    assert served.carrier.steps == 6, "the carrier went on after the stop string"


async def test_extras_of_serving_engines_reach_the_workers(
    client: openai.AsyncOpenAI, served: Served
):
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"17": -100},
        max_completion_tokens=9,
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [999],
            "return_token_ids": True,
            "priority": 1,
            "cache_salt": "mine",
        },
    )
    (job,) = served.carrier.jobs
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.logit_bias == {17: -100}
    assert (sampling.ignore_eos, sampling.min_tokens) == (True, 2)
    assert sampling.stop_token_ids == (999,)
    assert (job.max_tokens, job.priority) == (9, 1)
    assert job.salt == served.service.salt(job.tenant, "mine")
    tokens = served.carrier.tokens
    assert answer.choices[0].token_ids == (tokens * 2)[:9]  # type: ignore[attr-defined]
    assert answer.prompt_token_ids == job.prompt  # type: ignore[attr-defined]


async def test_special_tokens_are_shown_only_on_request(client: openai.AsyncOpenAI, served: Served):
    served.carrier.tokens[1:1] = [1]
    hidden = await client.chat.completions.create(model=MODEL, messages=CHAT)
    assert hidden.choices[0].message.content == SAID
    shown = await client.chat.completions.create(
        model=MODEL, messages=CHAT, extra_body={"skip_special_tokens": False}
    )
    assert shown.choices[0].message.content == "Hello<|im_start|>" + SAID[5:]


async def test_models_are_listed_and_retrieved(client: openai.AsyncOpenAI):
    assert [model.id async for model in client.models.list()] == [MODEL]
    model = await client.models.retrieve(MODEL)
    assert (model.object, model.owned_by) == ("model", "baton")
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("raised", "kind", "status"),
    [
        (errors.QueueFull("full"), openai.InternalServerError, 503),
        (errors.NoWorkers("none"), openai.InternalServerError, 503),
        (errors.DeadlineExceeded("queued"), openai.InternalServerError, 504),
        (errors.WorkerFailed("decode", "d0", "gone"), openai.InternalServerError, 502),
        (errors.PromptTooLong("too long"), openai.BadRequestError, 400),
        (RuntimeError("a bug"), openai.InternalServerError, 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token_are_statuses(
    client: openai.AsyncOpenAI, served: Served, raised, kind, status, stream
):
    served.carrier.failures[0] = raised
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model=MODEL, messages=CHAT, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.request_id
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


async def test_a_failure_in_a_stream_is_its_last_event(client: openai.AsyncOpenAI, served: Served):
    served.carrier.failures[3] = errors.WorkerFailed("decode", "d0", "it died")
    said: list[str | None] = []
    stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)

    async def read() -> None:
        async for chunk in stream:
            said.append(chunk.choices[0].delta.content)  # noqa: PERF401 kept when it raises

    with pytest.raises(openai.APIError, match="it died") as caught:
        await read()
    assert caught.value.code == "worker_failed"
    assert "".join(text or "" for text in said) == "Hello there,"


async def test_a_refused_field_is_named(client: openai.AsyncOpenAI):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=CHAT, tools=[tool])
    assert caught.value.param == "tools"


async def test_keys_are_asked_for_where_there_are_any(vocabulary):
    async with serving(vocabulary, api_keys=frozenset({"team:s3cret", "plain"})) as served:
        for key, tenant in (("s3cret", "team"), ("plain", "default")):
            async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key) as client:
                await client.chat.completions.create(model=MODEL, messages=CHAT)
            assert served.carrier.jobs[-1].tenant == tenant
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="guess") as client:
            for call in (
                client.chat.completions.create(model=MODEL, messages=CHAT),
                client.models.retrieve(MODEL),
            ):
                with pytest.raises(openai.AuthenticationError) as caught:
                    await call
                assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_request(
    client: openai.AsyncOpenAI, served: Served, stream: bool
):
    forever = asyncio.Event()

    async def stuck(step: int) -> None:
        if step == 2:
            await forever.wait()

    served.carrier.before = stuck
    if stream:
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        await anext(answer)
        await answer.close()
    else:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.chat.completions.create(model=MODEL, messages=CHAT))
            await until(lambda: served.carrier.running == 1)
            asking.cancel()
    await until(lambda: served.carrier.running == 0)
    await until(lambda: bool(served.observed))
    assert served.observed[0]["status"] == 499
