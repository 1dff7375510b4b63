"""Stock vLLM servers as a backend: one alone, or a pair that hands its own KV over (NIXL).

The pair is asked as vLLM's own router asks it: the prefill server for one token that nobody sees,
with the wish to hand over; what it says of its KV goes to the decode server unchanged, which
fetches it and generates. A prefill server keeps the KV that nobody fetches until vLLM's own lease
for it ends; that of a job aborted between the two is such.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, closing
from typing import Any

from backends.api import (
    BackendError,
    BackendInfo,
    BackendMisconfigured,
    DecodeJob,
    Logprob,
    Sampled,
)
from backends.checkpoint.opening import check_model_path, open_checkpoint
from backends.served import Fleet, Progressed, ServedEngine, Server
from backends.served.fleet import salt_of
from backends.vllm.sampling import HONOURED, parameters

PATH = "/v1/completions"
ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What vLLM's connector wants to be asked for a handoff."""


class VllmFleet(Fleet):
    """vLLM's servers."""

    async def open(self) -> BackendInfo:
        """Ask the servers what they serve, and compare it with the checkpoint."""
        with closing(open_checkpoint(check_model_path(self._options.model))) as checkpoint:
            spec, identity = checkpoint.spec, checkpoint.identity
        longest = self._options.context_tokens or spec.context_tokens
        for server in self._servers:
            longest = min(longest, _longest(server, await self._join(server)))
        return self._settle(identity, spec, longest, HONOURED, prompt_logprobs=True)

    async def generate(self, job: DecodeJob) -> AsyncGenerator[Progressed, None]:
        """Prefill, hand over, stream."""
        body = self._body(job)
        if self._prefill is not None or job.prompt_logprobs is not None:
            answer = await self._first(job, body)
            yield _prompt_done(job, answer)
            if self._prefill is not None:
                body["kv_transfer_params"] = _handed_over(self._prefill, answer)
        async with aclosing(self._decode.stream(PATH, {**body, "stream": True})) as events:
            async for event in events:
                yield Progressed(tokens=_tokens(event, job.sequence.sampling.logprobs))

    async def _first(self, job: DecodeJob, body: dict[str, Any]) -> Any:
        """Have the prompt computed, by the prefill server if there is one."""
        asked = {**body, "max_tokens": 1, "min_tokens": 0}
        if job.prompt_logprobs is not None:
            asked["prompt_logprobs"] = job.prompt_logprobs
        if self._prefill is None:
            return await self._decode.post(PATH, asked)
        return await self._prefill.post(PATH, {**asked, "kv_transfer_params": ASK})

    def _body(self, job: DecodeJob) -> dict[str, Any]:
        wishes = parameters(job.sequence, self._ends, self._left(job), None)
        bias = wishes.pop("logit_bias")
        del wishes["detokenize"], wishes["prompt_logprobs"]
        return {
            **wishes,
            "model": self._name,
            "prompt": job.context,
            "logit_bias": {str(token): it for token, it in bias.items()} if bias else None,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": salt_of(job),
        }


class VllmServedBackend(ServedEngine):
    """Stock vLLM servers, for a worker of the role `both`; see `ServedEngine` for its options.

    Two servers both have vLLM's `NixlConnector`. `model` is a folder in Hugging Face form or a
    GGUF file.
    """

    fleet = VllmFleet


def _longest(server: Server, model: Mapping[str, Any]) -> int:
    """How long a sequence may be there; vLLM counts the token after the last in it, too."""
    try:
        return int(model["max_model_len"])
    except (KeyError, TypeError, ValueError) as error:
        raise BackendMisconfigured(f"{server.address} is no vLLM: {error!r}") from error


def _handed_over(server: Server, answer: Any) -> Mapping[str, Any]:
    """What the prefill server says of its KV."""
    found = answer.get("kv_transfer_params")
    if not isinstance(found, dict):
        raise BackendError(f"{server.address} has no KV to hand over; has it a connector?")
    return found


def _prompt_done(job: DecodeJob, answer: Any) -> Progressed:
    try:
        details = answer["usage"].get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or 0
        if job.prompt_logprobs is None:
            return Progressed(prefilled=True, cached=cached)
        lines = answer["choices"][0]["prompt_logprobs"][1:]
        logprobs = tuple(
            _prompt_logprob(token, line, job.prompt_logprobs)
            for token, line in zip(job.context[1:], lines, strict=True)
        )
        return Progressed(prefilled=True, prompt_logprobs=logprobs, cached=cached)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BackendError(f"an answer of another form: {error!r}") from error


def _prompt_logprob(token: int, line: Mapping[str, Any], wanted: int) -> Logprob:
    ranked = sorted(line.items(), key=lambda one: one[1]["rank"])[:wanted]
    top = tuple((int(other), float(it["logprob"])) for other, it in ranked)
    return Logprob(token, float(line[str(token)]["logprob"]), top)


def _tokens(event: Any, wanted: int | None) -> tuple[Sampled, ...]:
    """The tokens of one event of a stream."""
    try:
        if "error" in event:
            raise BackendError(f"the server says {event['error']}")
        if not event["choices"]:
            return ()
        choice = event["choices"][0]
        tokens = choice["token_ids"] or []
        if wanted is None or not tokens:
            return tuple(Sampled(int(token)) for token in tokens)
        known = choice["logprobs"]
        lines = zip(tokens, known["token_logprobs"], known["top_logprobs"], strict=True)
        return tuple(Sampled(int(t), _logprob(int(t), own, top, wanted)) for t, own, top in lines)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(f"an event of another form: {error!r}") from error


def _logprob(token: int, own: float, top: Mapping[str, float] | None, wanted: int) -> Logprob:
    """`top` names tokens as `token_id:7`."""
    found = [(int(name.rpartition(":")[2]), float(it)) for name, it in (top or {}).items()]
    ranked = sorted(found, key=lambda one: -one[1])[:wanted]
    return Logprob(token, float(own), tuple(ranked))
