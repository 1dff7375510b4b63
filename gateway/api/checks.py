"""Check what a request asks for, field by field, and say in the workers' words how to sample.

Types are already right (`schema.py`); these are ranges, combinations, and what is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from backends.protocol import Sampling
from gateway.api.schema import ChatRequest, CompletionRequest, Generation
from gateway.errors import BadRequest

T = TypeVar("T")

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20
INT64 = (-(1 << 63), (1 << 63) - 1)
INT32 = (1 << 31) - 1
PRIORITIES = (-8, 7)


def _nothing(value: Any) -> bool:
    return value is None or value in ([], "")


def _one_of(*values: Any) -> Callable[[Any], bool]:
    # 1 is not True here
    kinds = [(type(one), one) for one in values]
    return lambda value: value is None or (type(value), value) in kinds


def _text_format(value: Any) -> bool:
    return value is None or value == {"type": "text"}


# What a field that is not supported may say nevertheless, because it asks for nothing.
ALLOWED: Mapping[str, Callable[[Any], bool]] = {
    "prompt_logprobs": _nothing,
    "truncate_prompt_tokens": _nothing,
    "structured_outputs": _nothing,
    "response_format": _text_format,
    "length_penalty": _one_of(1, 1.0),
    "use_beam_search": _one_of(False),
    "allowed_token_ids": _nothing,
    "bad_words": _nothing,
    "spaces_between_special_tokens": _one_of(True),
    "images": _nothing,
    "lora": _nothing,
    "tools": _nothing,
    "tool_choice": _one_of("none", "auto"),
    "functions": _nothing,
    "function_call": _one_of("none", "auto"),
    "modalities": _one_of(["text"]),
    "audio": _nothing,
    "prediction": _nothing,
    "web_search_options": _nothing,
    "reasoning_effort": _nothing,
    "verbosity": _one_of("medium"),
    "chat_template": _nothing,
    "continue_final_message": _one_of(False),
    "suffix": _nothing,
}


def refuse_unsupported(request: Generation) -> None:
    """Refuse what would change the answer and is not supported.

    Raises:
        BadRequest: names the field.
    """
    for field, allowed in ALLOWED.items():
        value = getattr(request, field, None)
        if value is not None and not allowed(value):
            message = f"`{field}` is not supported here with this value"
            raise BadRequest(message, field=field, code="unsupported_parameter")
    if request.best_of is not None and request.best_of != (request.n or 1):
        message = "`best_of` other than `n` is not supported here"
        raise BadRequest(message, field="best_of", code="unsupported_parameter")


def within(
    field: str, value: float | None, low: float, high: float, *, above: bool = False
) -> None:
    """Refuse a value outside `low` to `high`; `above`, `low` itself too."""
    if value is None:
        return
    if not (low < value <= high if above else low <= value <= high):
        bounds = f"more than {low} and at most {high}" if above else f"between {low} and {high}"
        raise BadRequest(f"`{field}` must be {bounds}, not {value}", field=field)


def check_ranges(request: Generation, *, max_n: int) -> None:
    """Refuse numbers that are out of bounds.

    Raises:
        BadRequest: names the field.
    """
    within("temperature", request.temperature, 0, 2)
    within("top_p", request.top_p, 0, 1, above=True)
    within("min_p", request.min_p, 0, 1)
    within("presence_penalty", request.presence_penalty, -2, 2)
    within("frequency_penalty", request.frequency_penalty, -2, 2)
    within("repetition_penalty", request.repetition_penalty, 0, 10, above=True)
    within("top_k", request.top_k, -1, INT32)
    within("min_tokens", request.min_tokens, 0, INT32)
    within("seed", request.seed, *INT64)
    within("priority", request.priority, *PRIORITIES)
    within("n", request.n, 1, max_n)
    if request.stream_options is not None and not request.stream:
        message = "`stream_options` is only allowed when `stream` is true"
        raise BadRequest(message, field="stream_options")


def stop_strings(request: Generation) -> list[str]:
    """The stop strings.

    Raises:
        BadRequest: too many, too long, or empty.
    """
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"`stop` may have at most {MAX_STOPS} strings", field="stop")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            message = f"`stop` strings must have 1 to {MAX_STOP_CHARACTERS} characters"
            raise BadRequest(message, field="stop")
    return stops


def check_ids(field: str, ids: list[int], vocabulary: int) -> None:
    """Refuse token ids that the model does not have."""
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = next(token for token in ids if not 0 <= token < vocabulary)
        message = f"`{field}`: {wrong} is no token; there are {vocabulary}"
        raise BadRequest(message, field=field)


def logprobs_of(request: ChatRequest | CompletionRequest) -> int | None:
    """How many of the likeliest tokens are wanted with each token; None: not even its own.

    Raises:
        BadRequest: too many, or alternatives without `logprobs`.
    """
    if isinstance(request, CompletionRequest):
        within("logprobs", request.logprobs, 0, MAX_LOGPROBS)
        return request.logprobs
    within("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    if request.top_logprobs and not request.logprobs:
        message = "`top_logprobs` needs `logprobs` to be true"
        raise BadRequest(message, field="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def sampling_of(request: ChatRequest | CompletionRequest, vocabulary: int) -> Sampling:
    """How to choose tokens, as workers are told.

    Raises:
        BadRequest: a bias or a stop token that cannot be.
    """
    bias = request.logit_bias or {}
    if len(bias) > MAX_BIASES:
        raise BadRequest(f"`logit_bias` may have at most {MAX_BIASES} tokens", field="logit_bias")
    check_ids("logit_bias", list(bias), vocabulary)
    for value in bias.values():
        within("logit_bias", value, -100, 100)
    stops = request.stop_token_ids or []
    if len(stops) > MAX_STOP_TOKENS:
        message = f"`stop_token_ids` may have at most {MAX_STOP_TOKENS} tokens"
        raise BadRequest(message, field="stop_token_ids")
    check_ids("stop_token_ids", stops, vocabulary)
    return Sampling(
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(_or(request.top_k, 0), 0),
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=bias,
        logprobs=logprobs_of(request),
        stop_token_ids=tuple(stops),
        min_tokens=_or(request.min_tokens, 0),
        ignore_eos=bool(request.ignore_eos),
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
