"""A model's vocabulary: text to token ids, chats to text, tokens to what they stand for.

`load.py` makes one from a model's files; nothing of them stays in memory but what is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from gateway.errors import PromptTooLong
from gateway.text.errors import TemplateMissing
from gateway.text.pieces import (
    ByteDetokenizer,
    BytePieces,
    Detokenizer,
    WindowDetokenizer,
)
from gateway.text.template import ChatTemplate

INLINE_CHARACTERS = 4096
"""Longer texts are tokenized in a thread: this many take one or two milliseconds."""


class Vocabulary:
    """What the gateway knows of a model.

    `size` counts tokens, added ones included; `context_tokens` is how many the model can look at.
    `byte_level`: tokens are written in the byte alphabet.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context_tokens: int,
        template: ChatTemplate | None,
        byte_level: bool,
    ) -> None:
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.context_tokens = context_tokens
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        special = frozenset(token for token, entry in added.items() if entry.special)
        self._every = BytePieces(tokenizer, frozenset()) if byte_level else None
        self._plain = BytePieces(tokenizer, special) if byte_level else None
        self._longest = max(len(token.encode()) for token in tokenizer.get_vocab())

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that asks the model for the chat's next message.

        Raises:
            TemplateMissing: the model has no chat template.
            TemplateFailed: its template refuses these messages.
        """
        if self._template is None:
            raise TemplateMissing("this model has no chat template; ask /v1/completions instead")
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )

    async def tokens_of(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of `text`; long texts are read in a thread.

        Raises:
            PromptTooLong: it has more bytes than a context full of the longest token.
        """
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        if len(text) > self.context_tokens * self._longest:
            raise PromptTooLong(
                f"the context has {self.context_tokens} tokens; the prompt's"
                f" {len(text)} characters cannot fit"
            )
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of `text`, on this thread."""
        # Of the tokenizer's methods only those for batches release the interpreter.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `tokens`, bytes that are no character as U+FFFD.

        Raises:
            PromptTooLong: there are more than the context holds; decoding a million takes seconds.
        """
        if len(tokens) > self.context_tokens:
            raise PromptTooLong(
                f"the context has {self.context_tokens} tokens; {len(tokens)} cannot fit"
            )
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def pieces(self, *, skip_special_tokens: bool) -> BytePieces | None:
        """What each token stands for, ready to send; None if the vocabulary has no bytes."""
        return self._plain if skip_special_tokens else self._every

    def quoted(self, *, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """Tokens that are whole characters, as JSON strings; it grows as tokens are met."""
        pieces = self.pieces(skip_special_tokens=skip_special_tokens)
        return {} if pieces is None else pieces.quoted

    def detokenizer(self, *, skip_special_tokens: bool, before: Sequence[int] = ()) -> Detokenizer:
        """For one sequence that continues the tokens `before`."""
        pieces = self.pieces(skip_special_tokens=skip_special_tokens)
        if pieces is not None:
            return ByteDetokenizer(pieces)
        return WindowDetokenizer(self._tokenizer, skip_special_tokens, before)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special ones by name; none for one that is not there."""
        if self._every is not None:
            return self._every.bytes_of(token)
        if not 0 <= token < self.size:
            return b""
        return self.decode([token]).encode()
