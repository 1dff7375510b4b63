"""Tokens to text, one token at a time, so that the parts add up to the text of the whole.

Nearly every vocabulary served today is byte-level: a token is some bytes, and the text is those
bytes as UTF-8. `BytePieces` keeps the bytes of tokens it has met, and which of them are whole
characters by themselves: for those, detokenizing is one look into a dictionary. Other
vocabularies go the slow way, through the tokenizer's own decoder.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

import msgspec
from tokenizers import Tokenizer

BROKEN = "\ufffd"


def _characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 wrote them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    shown = {chr(byte): byte for byte in plain}
    return shown | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _characters()


class Detokenizer(Protocol):
    """One sequence's text. `push` may hold back what is not a whole character yet."""

    @property
    def pending(self) -> bool:
        """Whether something is held back."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str:
        """What is held back, as the decoding of the whole would show it."""


class BytePieces:
    """What the tokens of a byte-level vocabulary mean, with or without the special ones.

    `quoted` has the tokens, of those met so far, that are whole characters and not empty: their
    text as a JSON string. The streaming path looks there first.
    """

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._bytes: dict[int, bytes] = {}
        self.whole: dict[int, str] = {}
        self.quoted: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of `token`; none for a skipped one, or one that the vocabulary lacks."""
        data = self._bytes.get(token)
        return self._meet(token) if data is None else data

    def _meet(self, token: int) -> bytes:
        data = b"" if token in self._skip else token_bytes(self._tokenizer, token)
        self._bytes[token] = data
        text, used = utf_8_decode(data, "ignore", False)
        if used == len(data) and text.encode() == data:
            self.whole[token] = text
            if text:
                self.quoted[token] = msgspec.json.encode(text)
        return data


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that `token` stands for in a byte-level vocabulary."""
    text = tokenizer.id_to_token(token) if token >= 0 else None
    if text is None:
        return b""
    try:
        return bytes(BYTE_OF[character] for character in text)
    except KeyError:  # an added token is written as it is
        return text.encode()


class ByteDetokenizer:
    """For a byte-level vocabulary."""

    __slots__ = ("_pieces", "_rest")

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._rest = b""

    @property
    def pending(self) -> bool:
        return bool(self._rest)

    def push(self, token: int) -> str:
        if not self._rest:
            text = self._pieces.whole.get(token)
            if text is not None:
                return text
        data = self._rest + self._pieces.bytes_of(token)
        text, used = utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._rest, "replace", True)
        self._rest = b""
        return text


class WindowDetokenizer:
    """For any vocabulary: decodes the last few tokens anew with each one, and shows what grew.

    The decoder may write a token differently depending on its neighbours, so a token is decoded
    together with those shown last (`before`, at first); text that ends in a broken character
    waits.
    """

    __slots__ = ("_context", "_skip", "_tokenizer", "_waiting")

    WINDOW = 6

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool, before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._context = list(before[-self.WINDOW :])
        self._waiting: list[int] = []

    @property
    def pending(self) -> bool:
        return bool(self._waiting)

    def push(self, token: int) -> str:
        self._waiting.append(token)
        before, after = self._decoded()
        if after.endswith(BROKEN) or len(after) <= len(before):
            return ""
        self._context, self._waiting = self._waiting, []
        return after[len(before) :]

    def flush(self) -> str:
        before, after = self._decoded()
        self._context, self._waiting = self._waiting, []
        return after[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        decode, skip = self._tokenizer.decode, self._skip
        return (
            decode(self._context, skip_special_tokens=skip),
            decode(self._context + self._waiting, skip_special_tokens=skip),
        )
