"""The bytes of a stream's events. What is the same in all of them is put together once."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.api.wishes import Wish

DONE = b"data: [DONE]\n\n"
END = b"\n\n"
encode = msgspec.json.encode


class Chunks:
    """The chunks of one answer, in the form of its endpoint.

    `usage` ends a chunk that has nothing to say about it; `closing` is everything after a text
    that comes alone.
    """

    def __init__(self, wish: Wish) -> None:
        self._chat = wish.style.chat
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            encode(wish.id),
            kind.encode(),
            wish.created,
            encode(wish.model),
        )
        self.usage = b',"usage":null}' + END if wish.style.usage else b"}" + END
        # OpenAI's schema wants the member in a completion's choice, asked for or not.
        told = self._chat or wish.style.logprobs is not None
        self._no_logprobs = b"" if told else b',"logprobs":null'
        self.closing = (
            self._after_text() + self._no_logprobs + b',"finish_reason":null}]' + self.usage
        )

    def opening(self, index: int) -> bytes:
        """Everything of a text chunk before its text, which follows as a JSON string."""
        if self._chat:
            return self._head + b'{"index":%d,"delta":{"content":' % index
        return self._head + b'{"index":%d,"text":' % index

    def text(self, index: int, text: str, extra: bytes, usage: bytes) -> bytes:
        """A text chunk with more in it; `extra` are members of the choice, each after a comma."""
        return b'%b%b%b%b%b,"finish_reason":null}]%b' % (
            self.opening(index),
            encode(text),
            self._after_text(),
            self._no_logprobs,
            extra,
            usage,
        )

    def role(self, index: int, prompt: list[int] | None, usage: bytes) -> bytes:
        """The first chunk of a chat's choice."""
        body = b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}]'
        ids = b"" if prompt is None else b',"prompt_token_ids":' + encode(prompt)
        return self._head + body % index + ids + usage

    def finish(self, index: int, reason: str, extra: bytes, usage: bytes) -> bytes:
        """The last chunk of a choice."""
        body = b'{"index":%d,"delta":{}' if self._chat else b'{"index":%d,"text":""'
        return b'%b%b%b%b,"finish_reason":"%b"}]%b' % (
            self._head,
            body % index,
            self._no_logprobs,
            extra,
            reason.encode(),
            usage,
        )

    def summary(self, usage: Any) -> bytes:
        """The chunk with no choices that only tells the usage."""
        return self._head + b'],"usage":' + encode(usage) + b"}" + END

    def _after_text(self) -> bytes:
        return b"}" if self._chat else b""


def error_event(body: bytes) -> bytes:
    """What ends a stream that cannot be finished."""
    return b"data: " + body + END
