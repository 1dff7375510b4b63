"""Chat messages to one prompt, by the model's own Jinja template in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.text.errors import ModelUnreadable, TemplateFailed


class ChatTemplate:
    """A compiled template, and the special tokens that it may name (`bos_token` ...).

    Raises:
        ModelUnreadable: the template is not valid Jinja.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source, globals=dict(tokens))
        except TemplateError as error:
            raise ModelUnreadable(f"the chat template is not valid: {error}") from error
        # Jinja chains these with its own; every rendering copies them, and a dict copies faster.
        self._template.globals = dict(self._template.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`; `variables` are further names for the template.

        Raises:
            TemplateFailed: the template refuses them (an unknown role, a forbidden order).
        """
        names = {
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise TemplateFailed(message) from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """As JSON without Jinja's HTML escapes, which models have not been trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
