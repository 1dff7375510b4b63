"""OpenAI's answers as structs. Required fields are always there, optional ones only when set."""

from __future__ import annotations

import msgspec

from backends.protocol import Logprob
from gateway.text import Vocabulary

LOWEST_LOGPROB = -9999.0  # minus infinity has no JSON


class Shape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Anything that is answered."""


class PromptTokens(Shape, frozen=True, omit_defaults=False):
    """How many tokens of the prompt did not have to be computed."""

    cached_tokens: int


class Usage(Shape, frozen=True):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens | None = None


class TopLogprob(Shape, frozen=True):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Shape, frozen=True):
    """A token and its likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape, frozen=True):
    """Of a chat's choice, or of one chunk of it."""

    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(Shape, frozen=True):
    """Of a completion's choice, in columns. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(Shape, frozen=True):
    """What the model says."""

    role: str
    content: str
    refusal: None


class ChatChoice(Shape, frozen=True):
    """One sequence of a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_ids: list[int] | None = None


class ChatAnswer(Shape, frozen=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class CompletionChoice(Shape, frozen=True):
    """One sequence of a completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(Shape, frozen=True):
    """The answer of POST /v1/completions."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Logged(msgspec.Struct, frozen=True):
    """A token, what the worker said of it, and where its text begins in the choice's text."""

    token: int
    logprob: Logprob | None
    offset: int


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> Usage:
    """The three numbers; at the end also how much of the prompts was there already."""
    details = PromptTokens(cached_tokens=cached_tokens) if cached_tokens is not None else None
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=details,
    )


def chat_logprobs(vocabulary: Vocabulary, logged: list[Logged], top: int) -> ChatLogprobs:
    """In the chat endpoint's shape."""
    content = []
    for entry in logged:
        if entry.logprob is None:
            continue
        data = vocabulary.token_bytes(entry.token)
        alternatives = [_top(vocabulary, *pair) for pair in entry.logprob.top[:top]]
        content.append(
            ChatLogprob(
                token=data.decode(errors="replace"),
                logprob=_finite(entry.logprob.logprob),
                bytes=list(data),
                top_logprobs=alternatives,
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    vocabulary: Vocabulary, logged: list[Logged], top: int
) -> CompletionLogprobs:
    """In the completion endpoint's shape: the chosen token is always among the likeliest."""
    tokens = [_name(vocabulary, entry.token) for entry in logged]
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_own(entry.logprob) for entry in logged],
        top_logprobs=[_likeliest(vocabulary, entry.logprob, top) for entry in logged],
        text_offset=[entry.offset for entry in logged],
    )


def _top(vocabulary: Vocabulary, token: int, logprob: float) -> TopLogprob:
    data = vocabulary.token_bytes(token)
    return TopLogprob(
        token=data.decode(errors="replace"), logprob=_finite(logprob), bytes=list(data)
    )


def _own(logprob: Logprob | None) -> float | None:
    return None if logprob is None else _finite(logprob.logprob)


def _likeliest(
    vocabulary: Vocabulary, logprob: Logprob | None, top: int
) -> dict[str, float] | None:
    if logprob is None:
        return None
    named = {_name(vocabulary, token): _finite(value) for token, value in logprob.top[:top]}
    return named | {_name(vocabulary, logprob.token): _finite(logprob.logprob)}


def _name(vocabulary: Vocabulary, token: int) -> str:
    """The token's text; half a character is spelled in bytes, so that no two look the same."""
    data = vocabulary.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
