"""Build a byte-level BPE tokenizer from the metadata of a GGUF file.

A GGUF file names its pre-tokenizer instead of describing it; the names understood here are in
`PRE_TOKENIZERS`. An unknown one is refused: guessing would cut words differently than the model
was trained to read them, and nothing would look wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from gateway.text.errors import ModelUnreadable

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(numbers: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS % numbers), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "gpt2": _gpt2,
    "smollm": _digits_then_gpt2,
    "llama-bpe": lambda: _words("{1,3}"),
    "llama3": lambda: _words("{1,3}"),
    "qwen2": lambda: _words(""),
}
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3"})
BEGINS_BY_DEFAULT = frozenset({"llama-bpe", "llama3"})


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises:
        ModelUnreadable: it is of another kind, or its parts do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelUnreadable(f"tokenizer.ggml.model is {kind!r}; only gpt2 (BPE) is understood")
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelUnreadable(f"tokenizer.ggml.pre is {pre!r}; known are {known}")
    tokens = _list_of(metadata, "tokenizer.ggml.tokens", str)
    tokenizer = Tokenizer(_model(tokens, metadata, pre in WHOLE_WORDS_FIRST))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, _list_of(metadata, "tokenizer.ggml.token_type", int))
    if metadata.get("tokenizer.ggml.add_bos_token", pre in BEGINS_BY_DEFAULT):
        _begin_with(tokenizer, tokens, metadata.get("tokenizer.ggml.bos_token_id"))
    return tokenizer


def _list_of(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise ModelUnreadable(f"{key} is missing")
    return values


def _model(tokens: list[str], metadata: Mapping[str, Any], whole_words: bool) -> models.BPE:
    pairs = []
    for line in _list_of(metadata, "tokenizer.ggml.merges", str):
        left, blank, right = line.partition(" ")
        if not (left and blank and right):
            raise ModelUnreadable(f"tokenizer.ggml.merges has {line!r}, which is no pair")
        pairs.append((left, right))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelUnreadable("tokenizer.ggml.tokens names a token twice")
    try:
        return models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words)
    except Exception as error:  # the library raises nothing narrower
        raise ModelUnreadable(f"tokens and merges do not fit together: {error}") from error


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    if len(kinds) != len(tokens):
        raise ModelUnreadable("tokenizer.ggml.token_type and tokens differ in length")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _begin_with(tokenizer: Tokenizer, tokens: list[str], begin: Any) -> None:
    if not isinstance(begin, int) or not 0 <= begin < len(tokens):
        raise ModelUnreadable("tokenizer.ggml.bos_token_id is missing")
    token = tokens[begin]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, begin)]
    )
