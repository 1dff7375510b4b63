"""How a request wants its tokens, in vLLM's words.

vLLM takes the whole known context for a prompt. What looks at generated tokens alone cannot be
asked for after a handoff, so `presence_penalty` and `frequency_penalty` are not honoured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.api import Logprob, Sampled, Sequence

HONOURED = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
    }
)


def parameters(
    sequence: Sequence, end_tokens: tuple[int, ...], most_new: int, prompt_logprobs: int | None
) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for the next `most_new` tokens of a sequence.

    All that may end the sequence are stop tokens, which vLLM does not sample before `min_tokens`.
    Where there are none, `min_tokens` is not asked for: a server would hold back the end tokens of
    its own model, although they are to be ignored.
    """
    wish = sequence.sampling
    stops = {*wish.stop_token_ids, *(() if wish.ignore_eos else end_tokens)}
    least = max(0, min(wish.min_tokens - len(sequence.generated), most_new)) if stops else 0
    return {
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        "top_k": wish.top_k,
        "min_p": wish.min_p,
        "repetition_penalty": wish.repetition_penalty,
        "logit_bias": wish.logit_bias or None,
        "logprobs": wish.logprobs,
        "prompt_logprobs": prompt_logprobs,
        "stop_token_ids": sorted(stops),
        "min_tokens": least,
        "ignore_eos": True,
        "max_tokens": most_new,
        "seed": None if wish.temperature == 0 else sequence.seed % (1 << 63),
        "detokenize": False,
    }


def sampled(token: int, known: Mapping[int, Any] | None, wanted: int | None) -> Sampled:
    """A token as vLLM gives it. `known` has the log probabilities that it looked up, by token."""
    if known is None or wanted is None:
        return Sampled(token)
    return Sampled(token, logprob(token, known, wanted))


def logprob(token: int, known: Mapping[int, Any], wanted: int) -> Logprob:
    """Of `token`, and of the `wanted` likeliest, best first."""
    ranked = sorted(known.items(), key=lambda one: one[1].rank)[:wanted]
    top = tuple((other, one.logprob) for other, one in ranked)
    return Logprob(token, known[token].logprob, top)
