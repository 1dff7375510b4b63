"""Check a chat's messages, and make of them what a chat template expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.api.schema import ChatMessage, Part
from gateway.errors import BadRequest

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant")
UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "audio")
RESERVED = ("messages", "add_generation_prompt")


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages whose content is one string each.

    Raises:
        BadRequest: there are none, or one is not of the supported kind; names it.
    """
    if not messages:
        raise BadRequest("`messages` must not be empty", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"`messages` may have at most {MAX_MESSAGES}", field="messages")
    return [_plain(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _plain(message: ChatMessage, path: str) -> dict[str, Any]:
    if message.role not in ROLES:
        roles = ", ".join(ROLES)
        raise BadRequest(f"`{path}.role` must be one of {roles}", field=f"{path}.role")
    for field in UNSUPPORTED:
        if getattr(message, field):
            raise _unsupported(f"{path}.{field}")
    # OpenAI's newer name for the same role; templates know the older one
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message, path)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _text(message: ChatMessage, path: str) -> str:
    content = message.content
    if content is None:
        raise BadRequest(f"`{path}.content` is missing", field=f"{path}.content")
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{path}.content[{place}]") for place, part in enumerate(content))


def _part(part: Part, path: str) -> str:
    if part.type != "text":
        raise _unsupported(f"{path}.type")
    if part.text is None:
        raise BadRequest(f"`{path}.text` is missing", field=f"{path}.text")
    return part.text


def _unsupported(path: str) -> BadRequest:
    message = f"`{path}` is not supported here; this model reads and writes text only"
    return BadRequest(message, field=path, code="unsupported_parameter")


def template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """What `chat_template_kwargs` offers to the template.

    Raises:
        BadRequest: it names what only the gateway sets.
    """
    for name in given or ():
        if name in RESERVED:
            field = f"chat_template_kwargs.{name}"
            raise BadRequest(f"`{field}` cannot be set", field=field)
    return given or {}
