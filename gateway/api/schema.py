"""What clients may send, as structs; unknown fields and wrong types are refused by name.

Three kinds of fields: those that are honoured, harmless ones that are accepted and have no
effect on the answer, and those that would change the answer but are not supported. The last are
declared too, so that the refusal can say so; `checks.py` has the values it lets through.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

from gateway.errors import BadRequest

Ids = list[int]
Short = Annotated[str, msgspec.Meta(max_length=512)]


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Anything that a client sends."""


class StreamOptions(Body, frozen=True, kw_only=True):
    """What a stream tells beside text. `include_obfuscation` is accepted and does nothing."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Part(Body, frozen=True, kw_only=True):
    """One part of a message's content; only those of type `text` are understood."""

    type: str
    text: str | None = None
    image_url: Any = None
    video_url: Any = None
    audio_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None
    cache_control: Any = None


class ChatMessage(Body, frozen=True, kw_only=True):
    """One message. Fields that our own answers carry come back from clients and are let in."""

    role: str
    content: str | list[Part] | None = None
    name: Short | None = None
    refusal: Any = None
    annotations: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None


class Generation(Body, frozen=True, kw_only=True):
    """What both endpoints share."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    # beyond OpenAI's, as serving engines have them
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Ids | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: Short | None = None

    # no effect on the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # not supported, other than as `checks.ALLOWED` says
    best_of: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    structured_outputs: Any = None
    response_format: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    spaces_between_special_tokens: Any = None
    images: Any = None
    lora: Any = None


class ChatRequest(Generation, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    parallel_tool_calls: bool | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    chat_template: Any = None
    continue_final_message: Any = None


class CompletionRequest(Generation, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[int | str | Ids]
    echo: bool | None = None
    logprobs: int | None = None

    suffix: Any = None


class TokenizeRequest(Body, frozen=True, kw_only=True):
    """POST /tokenize: a prompt or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


B = TypeVar("B", bound=Body)

NAMED = re.compile(
    r"^Object (?P<kind>contains unknown|missing required) field `(?P<name>.*?)`"
    r"(?: - at `\$(?P<path>.*)`)?$",
    re.DOTALL,
)
LOCATED = re.compile(r"^(?P<what>.*) - at (?:`key` in )?`\$(?P<path>.*)`$", re.DOTALL)


def decode(kind: type[B], body: bytes) -> B:
    """`body` as a `kind`.

    Raises:
        BadRequest: it is no JSON, or not of that form; names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not valid UTF-8", code="invalid_json") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from error


def _refusal(message: str) -> BadRequest:
    named = NAMED.match(message)
    if named:
        field = _join(named["path"], named["name"])
        if named["kind"].startswith("missing"):
            text = f"`{field}` is missing"
            return BadRequest(text, field=field, code="missing_required_parameter")
        return BadRequest(f"unknown field `{field}`", field=field, code="unknown_parameter")
    located = LOCATED.match(message)
    if located:
        field = _join(located["path"], "")
        return BadRequest(f"`{field}`: {located['what']}", field=field, code="invalid_type")
    return BadRequest(f"the body: {message}", code="invalid_type")


def _join(path: str | None, name: str) -> str:
    """`$.messages[0]` and `role` make `messages[0].role`. What a client named is cut short."""
    parts = ((path or "").lstrip("."), name[:128])
    return ".".join(part for part in parts if part)
