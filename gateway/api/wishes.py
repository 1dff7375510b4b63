"""From a request that was read to what has to be done: jobs for the carrier, and how to tell.

Everything that can be refused is refused here, before anything is queued.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from backends.protocol import Sampling
from gateway.api import checks
from gateway.api.messages import plain_messages, template_variables
from gateway.api.progress import Progress
from gateway.api.schema import ChatRequest, CompletionRequest
from gateway.api.service import Service
from gateway.errors import BadRequest, PromptTooLong
from gateway.life.job import Job
from gateway.quota import Quota
from gateway.resume import Claim, Saved
from gateway.tenants import Tenant
from gateway.text import TemplateFailed, TemplateMissing
from gateway.text.stops import StopStrings

COMPLETION_TOKENS = 16
NOTHING_TOLD = Progress("")


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How the answer is told. `logprobs`: how many of the likeliest tokens are told of each."""

    chat: bool
    stream: bool
    stops: StopStrings | None
    include_stop: bool
    min_tokens: int
    skip_special_tokens: bool
    logprobs: int | None
    token_ids: bool
    echo: bool
    usage: bool
    running_usage: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """One request: a job per prompt, `n` sequences each. `texts` are the prompts to echo.

    `score_only`: nothing is to be generated. Jobs cannot generate nothing, so each makes one
    token that is not told.

    With a `claim` it may be asked for again; `progress` is what of it the client has already.
    """

    id: str
    created: int
    model: str
    n: int
    jobs: tuple[Job, ...]
    texts: tuple[str, ...]
    style: Style
    seed: int = 0
    score_only: bool = False
    claim: Claim | None = None
    progress: Progress = NOTHING_TOLD

    @property
    def prompt_tokens(self) -> int:
        """All prompts together."""
        return sum(len(job.prompt) for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, under which id, when it came and until when it must be answered.

    `told` hears what is left to the tenant. `origin` is the request that this one repeats.
    """

    tenant: Tenant
    id: str
    arrived: float
    deadline: float
    told: Callable[[Quota], None]
    origin: Saved | None = None

    def again(self, claim: Claim) -> Caller:
        """The same for a request that was made before."""
        deadline = asyncio.get_running_loop().time() + claim.left
        return replace(self, id=claim.id, deadline=deadline, origin=claim.saved)


async def chat_wish(service: Service, request: ChatRequest, caller: Caller) -> Wish:
    """What a chat asks for.

    Raises:
        BadRequest: names the field.
    """
    _check(service, request)
    limit = _chat_limit(request)
    try:
        text = service.text.chat_prompt(
            plain_messages(request.messages),
            add_generation_prompt=request.add_generation_prompt is not False,
            variables=template_variables(request.chat_template_kwargs),
        )
    except (TemplateFailed, TemplateMissing) as error:
        raise BadRequest(str(error), field="messages", code="chat_template") from error
    if caller.origin is not None:
        prompt = caller.origin.prompts[0]
    else:
        special = bool(request.add_special_tokens)
        prompt = await service.text.tokens_of(text, add_special_tokens=special)
    return _wish(service, request, caller, [prompt], limit=limit, texts=())


async def completion_wish(service: Service, request: CompletionRequest, caller: Caller) -> Wish:
    """What a completion asks for.

    Raises:
        BadRequest: names the field.
    """
    _check(service, request)
    limit = request.max_tokens
    checks.within("max_tokens", limit, 0 if request.echo else 1, checks.INT32)
    prompts = _prompts(request.prompt)
    choices = len(prompts) * (request.n or 1)
    if choices > service.max_choices:
        message = f"{choices} choices (prompts times `n`) exceed {service.max_choices}"
        raise BadRequest(message, field="prompt")
    vocabulary = service.text
    ids, texts = [], []
    for number, prompt in enumerate(prompts):
        if caller.origin is not None:
            ids.append(caller.origin.prompts[number])
        elif isinstance(prompt, str):
            special = request.add_special_tokens is not False
            ids.append(await vocabulary.tokens_of(prompt, add_special_tokens=special))
        else:
            checks.check_ids("prompt", prompt, vocabulary.size)
            ids.append(prompt)
        if request.echo:
            text = prompt if isinstance(prompt, str) else vocabulary.decode(prompt)
            texts.append(text)
    return _wish(service, request, caller, ids, limit=limit, texts=tuple(texts))


def _check(service: Service, request: ChatRequest | CompletionRequest) -> None:
    service.check_model(request.model)
    checks.refuse_unsupported(request)
    checks.check_ranges(request, max_n=service.max_n)


def _chat_limit(request: ChatRequest) -> int | None:
    checks.within("max_tokens", request.max_tokens, 1, checks.INT32)
    checks.within("max_completion_tokens", request.max_completion_tokens, 1, checks.INT32)
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        message = "`max_tokens` and `max_completion_tokens` say different things; give one"
        raise BadRequest(message, field="max_tokens")
    return both.pop() if both else None


def _prompts(prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """The prompts, whichever of the four forms they came in."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequest("`prompt` must not be empty", field="prompt")
    if all(isinstance(one, int) for one in prompt):
        return [[one for one in prompt if isinstance(one, int)]]
    prompts: list[str | list[int]] = []
    kind = type(prompt[0])
    for place, one in enumerate(prompt):
        if isinstance(one, int) or type(one) is not kind:
            message = "`prompt` mixes strings, tokens and lists of tokens"
            raise BadRequest(message, field=f"prompt[{place}]")
        prompts.append(one)
    return prompts


def _wish(
    service: Service,
    request: ChatRequest | CompletionRequest,
    caller: Caller,
    prompts: Sequence[list[int]],
    *,
    limit: int | None,
    texts: tuple[str, ...],
) -> Wish:
    n = request.n or 1
    sampling = checks.sampling_of(request, service.text.size)
    origin = caller.origin
    seed = secrets.randbits(63) if request.seed is None else request.seed
    seed = seed if origin is None else origin.seed
    seeds = tuple(derive_seed(seed, index) for index in range(n))
    style = _style(request, sampling)
    salt = service.salt(caller.tenant.name, request.cache_salt or "")
    jobs = []
    for number, prompt in enumerate(prompts):
        tokens = _max_tokens(service, request, prompt, limit)
        jobs.append(
            Job(
                id=caller.id if len(prompts) == 1 else f"{caller.id}-{number}",
                model=service.model,
                tenant=caller.tenant.name,
                prompt=prompt,
                seeds=seeds,
                sampling=sampling,
                max_tokens=tokens,
                deadline=caller.deadline,
                first_token_by=service.first_token_by(caller.arrived, len(prompt))
                if origin is None
                else inf,
                gap_seconds=service.gap_seconds or inf,
                decode_estimate=tokens
                if sampling.ignore_eos
                else min(tokens, service.expected_output_tokens),
                priority=caller.tenant.priority if request.priority is None else request.priority,
                terms=caller.tenant.terms,
                counts=number == 0 and origin is None,
                told=caller.told,
                prompt_logprobs=sampling.logprobs if style.echo else None,
                salt=salt,
            )
        )
    return Wish(
        id=f"{'chatcmpl' if style.chat else 'cmpl'}-{caller.id}",
        created=int(time.time()) if origin is None else origin.created,
        model=service.model,
        n=n,
        jobs=tuple(jobs),
        texts=texts,
        style=style,
        seed=seed,
        score_only=limit == 0,
    )


def _style(request: ChatRequest | CompletionRequest, sampling: Sampling) -> Style:
    stops = checks.stop_strings(request)
    include = bool(request.include_stop_str_in_output)
    options = request.stream_options
    return Style(
        chat=isinstance(request, ChatRequest),
        stream=bool(request.stream),
        stops=StopStrings(stops, include=include) if stops else None,
        include_stop=include,
        min_tokens=sampling.min_tokens,
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=sampling.logprobs,
        token_ids=bool(request.return_token_ids),
        echo=isinstance(request, CompletionRequest) and bool(request.echo),
        usage=bool(options and options.include_usage),
        running_usage=bool(options and options.continuous_usage_stats),
    )


def _max_tokens(
    service: Service,
    request: ChatRequest | CompletionRequest,
    prompt: list[int],
    limit: int | None,
) -> int:
    """How many tokens may be generated after `prompt`; at least one, as a job needs it."""
    chat = isinstance(request, ChatRequest)
    field = "messages" if chat else "prompt"
    if not prompt:
        raise BadRequest("the prompt is empty: it has no tokens", field=field)
    context = service.text.context_tokens
    room = context - len(prompt)
    if room < max(limit or 0, 1):
        wanted = f"{limit} to generate" if limit else "at least one to generate"
        raise PromptTooLong(
            f"the context has {context} tokens; {len(prompt)} are in the prompt, and {wanted}",
            field=field if room < 1 or not limit else "max_tokens",
        )
    if limit is None:
        limit = room if chat else min(COMPLETION_TOKENS, room)
    if (request.min_tokens or 0) > limit:
        message = f"`min_tokens` exceeds the {limit} tokens that may be generated"
        raise BadRequest(message, field="min_tokens")
    return max(limit, 1)


def derive_seed(seed: int, index: int) -> int:
    """The seed of sequence `index`: same request, same seeds; no two sequences alike."""
    data = seed.to_bytes(9, "big", signed=True) + index.to_bytes(4, "big")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
