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
from backends.checkpoint.checks import check_whole, converted
from backends.checkpoint.opening import check_model_path
from backends.served import Progressed, ServedEngine, Server
from backends.served.engine import no_layout
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


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `[workers.X.options]` may say; see `TensorRTLLMServed`."""

    model: str
    decode: str
    prefill: str = ""
    served_model: str = ""
    capacity_tokens: int = 1 << 18
    context_tokens: int | None = None
    max_batch: int = 256
    share_prefixes: bool = False
    silence_seconds: float = 60.0
    open_seconds: float = 30.0


class TensorRTLLMServed(ServedEngine):
    """Servers started with `trtllm-serve`, for a worker of the role `both`.

    `decode` is the address of a generation server, such as `http://127.0.0.1:8003`; `prefill`,
    where it is given, that of the context server that prefills for it; both with a
    `cache_transceiver_config`. `model` is what they serve, as a folder in Hugging Face form, for
    its vocabulary; `served_model` what they call it, if not by one name only. `capacity_tokens` may
    be in work at a time; `context_tokens` is how long their sequences may be (`max_seq_len`), if
    that is less than the model was made for. Servers that keep prompts apart by no salt share
    what they have of them between all tenants: `share_prefixes` says that they may. A server that
    says nothing for `silence_seconds`, which must be less than the worker's `step_timeout_seconds`,
    fails the request.

    Raises:
        BackendMisconfigured: an option is wrong, or a server does not fit.
        BackendError: a server cannot be reached.
    """

    def __init__(
        self,
        *,
        model: str,
        decode: str,
        prefill: str = "",
        served_model: str = "",
        capacity_tokens: int = 1 << 18,
        context_tokens: int | None = None,
        max_batch: int = 256,
        share_prefixes: bool = False,
        silence_seconds: float = 60.0,
        open_seconds: float = 30.0,
    ) -> None:
        given = {name: it for name, it in locals().items() if name in Options.__struct_fields__}
        read = converted(given, Options)
        check_whole("capacity_tokens", read.capacity_tokens, 1 << 40)
        check_whole("context_tokens", read.context_tokens, 1 << 24)
        super().__init__(TensorRTLLMFleet(read), read.open_seconds)


class TensorRTLLMFleet:
    """One server, or two of which one computes the prompts."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._decode = Server(options.decode, options.silence_seconds)
        self._prefill = (
            Server(options.prefill, options.silence_seconds) if options.prefill else None
        )
        self._ends: tuple[int, ...] = ()
        self._name = ""
        self._context = 0
        self._takes: frozenset[str] = frozenset()
        self._numbered = False
        self._ids = itertools.count(secrets.randbelow(1 << 20))

    @property
    def _servers(self) -> list[Server]:
        return [self._decode, self._prefill] if self._prefill is not None else [self._decode]

    async def open(self) -> BackendInfo:
        """Ask the servers what they serve and what they take."""
        path = check_model_path(self._options.model)
        spec = spec_of(path)
        self._ends = spec.end_tokens
        takes = []
        for server in self._servers:
            await server.open()
            self._fit(server, await server.get("/v1/models"))
            schema = await server.get(SCHEMA)
            takes.append(_fields(server, schema, "CompletionRequest"))
        self._takes = frozenset.intersection(*takes)
        self._check_takes()
        if self._prefill is not None:
            self._numbered = "disagg_request_id" in _fields(server, schema, "DisaggregatedParams")
        self._context = min(
            self._options.context_tokens or spec.context_tokens, spec.context_tokens
        )
        layout = no_layout(self._name)
        blocks = layout.blocks_for(self._options.capacity_tokens)
        return BackendInfo(
            layout=layout,
            pool_blocks=blocks,
            kind="engine",
            engine_blocks=blocks,
            vocabulary=spec.vocabulary,
            context_tokens=self._context - 1,
            end_tokens=self._ends,
            rng="engine",
            continuation="equivalent",
            sampling=frozenset(ours for ours, theirs in WORDS.items() if theirs in self._takes),
            prompt_logprobs=False,
            max_batch=self._options.max_batch,
        )

    def _fit(self, server: Server, answer: Any) -> None:
        """Settle on the model's name."""
        try:
            served = [str(one["id"]) for one in answer["data"]]
        except (KeyError, TypeError) as error:
            raise BackendMisconfigured(f"{server.address} is no trtllm-serve: {error!r}") from error
        wanted = self._options.served_model or self._name or (served[0] if len(served) == 1 else "")
        if wanted not in served:
            raise BackendMisconfigured(
                f"served_model: {server.address} serves {', '.join(sorted(served))}"
            )
        self._name = wanted

    def _check_takes(self) -> None:
        wanted = NEEDED | (HANDOFF if self._prefill is not None else frozenset())
        if missing := sorted(wanted - self._takes):
            raise BackendMisconfigured(f"the servers do not take {', '.join(missing)}")
        if "cache_salt" not in self._takes and not self._options.share_prefixes:
            raise BackendMisconfigured(
                "share_prefixes: the servers keep no tenant's prompts apart (they take no"
                " cache_salt); say true if they may be shared, or if the servers reuse none"
            )

    async def close(self) -> None:
        """Close every connection."""
        for server in self._servers:
            await server.close()

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
        most = min(job.max_tokens - len(sequence.generated), self._context - len(job.context))
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
            "cache_salt": job.salt.hex() or f"only {job.name}",
        }
        return {name: value for name, value in body.items() if name in self._takes}


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
