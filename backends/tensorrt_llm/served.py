"""`trtllm-serve` servers as a backend: one alone, or a context and a generation server.

The pair is asked as its own orchestrator asks it: the context server for the prompt, without a
stream; what it says of its KV goes to the generation server unchanged, which fetches it and
generates. KV that nobody fetches (a job that was aborted between the two) stays in the context
server until its own `kv_transfer_timeout_ms`. What a server takes is read from its `/openapi.json`:
an unknown field is an error there.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec

from backends.api import (
    BackendError,
    BackendInfo,
    BackendMisconfigured,
    DecodeJob,
    Sampled,
    Sampling,
)
from backends.checkpoint.opening import check_model_path
from backends.served import Fleet, Options, Progressed, ServedEngine, Server
from backends.served.fleet import salt_of
from backends.tensorrt_llm.model import spec_of

PATH = "/v1/completions"
SCHEMA = "/openapi.json"

NEEDED = frozenset({"model", "prompt", "max_tokens", "stream", "stream_options", "detokenize"})
HANDOFF = frozenset({"disaggregated_params"})

WORDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "prompt_ignore_length",
    "frequency_penalty": "prompt_ignore_length",
    "logit_bias": "logit_bias",
    "stop_token_ids": "stop_token_ids",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
}
"""A wish of ours, and the field without which a server cannot be asked for it."""

GENERATES = ("length", "not_finished")
"""How a context server says that there is more to generate."""


class ServeOptions(Options, frozen=True, kw_only=True):
    """With one more; see `TensorRTLLMServed`."""

    share_prefixes: bool = False


class TensorRTLLMFleet(Fleet):
    """`trtllm-serve`'s servers."""

    def __init__(self, options: ServeOptions) -> None:
        super().__init__(options)
        self._share_prefixes = options.share_prefixes
        self._takes: frozenset[str] = frozenset()
        self._numbered = False
        self._ids = itertools.count(secrets.randbelow(1 << 20))

    async def open(self) -> BackendInfo:
        """Ask the servers what they serve and what they take."""
        spec = spec_of(check_model_path(self._options.model))
        takes = []
        for server in self._servers:
            await self._join(server)
            schema = await server.get(SCHEMA)
            takes.append(_fields(server, schema, "CompletionRequest"))
        self._takes = frozenset.intersection(*takes)
        self._check_takes()
        if self._prefill is not None:
            self._numbered = "disagg_request_id" in _fields(server, schema, "DisaggregatedParams")
        longest = min(self._options.context_tokens or spec.context_tokens, spec.context_tokens)
        honoured = frozenset(ours for ours, theirs in WORDS.items() if theirs in self._takes)
        return self._settle(self._name, spec, longest, honoured, prompt_logprobs=False)

    def _check_takes(self) -> None:
        wanted = NEEDED | (HANDOFF if self._prefill is not None else frozenset())
        if missing := sorted(wanted - self._takes):
            raise BackendMisconfigured(f"the servers do not take {', '.join(missing)}")
        if "cache_salt" not in self._takes and not self._share_prefixes:
            raise BackendMisconfigured(
                "share_prefixes: the servers keep no tenant's prompts apart (they take no"
                " cache_salt); say true if they may be shared, or if the servers reuse none"
            )

    async def generate(self, job: DecodeJob) -> AsyncGenerator[Progressed, None]:
        """Have the prompt computed, hand over, stream."""
        body = self._body(job)
        known = 0
        if self._prefill is not None:
            first = await self._context_phase(self._prefill, body)
            yield Progressed(tokens=(Sampled(first.token),), prefilled=True, cached=first.cached)
            if not first.goes_on:
                return
            body["disaggregated_params"] = first.handed_over
            known = 1
        asked = {**body, "stream": True, "stream_options": USAGE}
        async with aclosing(self._decode.stream(PATH, asked)) as events:
            async for event in events:
                tokens = _tokens(event, known)
                known += len(tokens)
                yield Progressed(tokens=tuple(Sampled(token) for token in tokens))

    async def _context_phase(self, server: Server, body: Mapping[str, Any]) -> ContextPhase:
        """Have the context server compute the prompt; older ones number their requests alone."""
        number = {"disagg_request_id": self._new_id()} if self._numbered else {}
        wish = {"request_type": "context_only", **number}
        answer = await server.post(PATH, {**body, "stream": False, "disaggregated_params": wish})
        return ContextPhase.of(server, answer, number)

    def _new_id(self) -> int:
        """A number that no other request of this fleet has: milliseconds, then a count."""
        milliseconds = int(time.time() * 1000) & ((1 << 39) - 1)
        return (milliseconds | 1 << 38) << 20 | next(self._ids) & ((1 << 20) - 1)

    def _body(self, job: DecodeJob) -> dict[str, Any]:
        sequence, wish = job.sequence, job.sequence.sampling
        most = self._left(job)
        stops = {*wish.stop_token_ids, *(() if wish.ignore_eos else self._ends)}
        bias = {str(token): it for token, it in wish.logit_bias.items()}
        body = {
            "model": self._name,
            "prompt": job.context,
            "max_tokens": most,
            "detokenize": False,
            "seed": None if wish.temperature == 0 else sequence.seed % (1 << 63),
            **_choice(wish),
            "min_p": wish.min_p,
            "repetition_penalty": wish.repetition_penalty,
            "presence_penalty": wish.presence_penalty,
            "frequency_penalty": wish.frequency_penalty,
            "prompt_ignore_length": len(sequence.prompt),
            "logit_bias": bias or None,
            "stop_token_ids": sorted(stops),
            "min_tokens": max(0, min(wish.min_tokens - len(sequence.generated), most)),
            "ignore_eos": wish.ignore_eos,
            "cache_salt": salt_of(job),
        }
        return {name: value for name, value in body.items() if name in self._takes}


class TensorRTLLMServed(ServedEngine):
    """Servers started with `trtllm-serve`, for a worker of the role `both`.

    See `ServedEngine` for its options. Two of them, a context and a generation server, both have a
    `cache_transceiver_config`. `model` is a folder in Hugging Face form. The servers do not say how
    long sequences may be (`max_seq_len`): `context_tokens` does, if that is less than the model
    was made for. Those that keep prompts apart by no salt share what they have of them between all
    tenants: `share_prefixes` says that they may.
    """

    options = ServeOptions
    fleet = TensorRTLLMFleet


def _choice(wish: Sampling) -> dict[str, Any]:
    """How the next token is drawn; greedily by leaving only one to choose from."""
    if wish.temperature == 0:
        return {"top_k": 1}
    top_k = max(0, wish.top_k)
    return {"temperature": wish.temperature, "top_p": wish.top_p, "top_k": top_k}


USAGE = {"include_usage": True, "continuous_usage_stats": True}
"""Every event then says how many tokens there are in all, the first one included."""


class ContextPhase(msgspec.Struct, frozen=True):
    """What a context server gives: the first token, and what the generation server needs."""

    token: int
    goes_on: bool
    handed_over: Mapping[str, Any]
    cached: int

    @classmethod
    def of(cls, server: Server, answer: Any, number: Mapping[str, int]) -> ContextPhase:
        """Read an answer.

        Raises:
            BackendError: it is of another form.
        """
        try:
            [choice] = answer["choices"]
            given = choice.get("disaggregated_params") or {}
            tokens = given.get("first_gen_tokens") or choice.get("token_ids")
            goes_on = choice["finish_reason"] in GENERATES
            if goes_on and given.get("ctx_request_id") is None:
                raise BackendError(
                    f"{server.address} has no KV to hand over: has it a transceiver?"
                )
            details = answer["usage"].get("prompt_tokens_details") or {}
            return cls(
                token=int(tokens[0]),
                goes_on=goes_on,
                handed_over={**given, "request_type": "generation_only", **number},
                cached=int(details.get("cached_tokens") or 0),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise BackendError(f"{server.address}: an answer of another form: {error!r}") from error


def _fields(server: Server, schema: Any, name: str) -> frozenset[str]:
    """Which fields a record may have there."""
    try:
        return frozenset(schema["components"]["schemas"][name]["properties"])
    except (KeyError, TypeError) as error:
        raise BackendMisconfigured(f"{server.address}{SCHEMA} does not describe {name}") from error


def _tokens(event: Any, known: int) -> list[int]:
    """The tokens of one event that are new; `known` of them were told before.

    Some releases tell the context server's token again, and some do not: the count of all says
    which.
    """
    try:
        if "error" in event:
            raise BackendError(f"the server says {event['error']}")
        if not event["choices"]:
            return []
        [choice] = event["choices"]
        tokens = [int(token) for token in choice["token_ids"] or ()]
        fresh = int(event["usage"]["completion_tokens"]) - known
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(f"an event of another form: {error!r}") from error
    if not 0 <= fresh <= len(tokens):
        raise BackendError(f"{len(tokens)} tokens came where {fresh} are new")
    return tokens[len(tokens) - fresh :]
