"""The engines of the matrix, and the prompts."""

from __future__ import annotations

import importlib.util
from typing import Any

import msgspec

from gateway.text.load import load_text


class Engine(msgspec.Struct, frozen=True):
    """One engine: its plug-in (`module:Class` where it has no entry point), and its options.

    `exact` are those of the float32 row, `mixed` those of its own precision; None where it has
    none. Without the module `needs` it is left out. `reads_folders`: and no GGUF files.
    """

    name: str
    backend: str
    needs: str
    exact: dict[str, Any] | None
    mixed: dict[str, Any] | None
    reads_folders: bool = False

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return importlib.util.find_spec(self.needs) is not None

    def options(self, precision: str) -> dict[str, Any] | None:
        """Those of "float32" or of "mixed"."""
        return self.exact if precision == "float32" else self.mixed


ENGINES = (
    Engine("torch", "emulation", "torch", {"dtype": "float32"}, {"dtype": "bfloat16"}),
    Engine("onnxruntime", "onnxruntime", "onnx", {"weights": "float32"}, {"weights": "q4"}),
    Engine(
        "llama.cpp",
        "llamacpp",
        "llama_cpp",
        {"weights": "float32", "kv_dtype": "float32"},
        {"weights": "stored"},
    ),
    Engine("vllm", "vllm", "vllm", {"dtype": "float32"}, {}, reads_folders=True),
    Engine("abacus", "tests.third_party.abacus_decode:AbacusBackend", "numpy", {}, None),
)

REFERENCE = ENGINES[0]
"""Alone and in float32 it is what the others are compared with."""

PREFILLING = {"torch": {"block_tokens": 32, "axes": "layer kv block token head dim"}}
"""What the prefill side has different from the decode side, where it can be chosen."""

_SUBJECTS = (
    "the tides", "a bicycle", "bread", "the Moon", "chess", "a violin", "rust", "the heart",
    "snow", "a compass", "honey", "volcanoes", "the alphabet", "glass", "sleep", "a bridge",
)  # fmt: skip
_QUESTIONS = (
    "In one sentence, what is interesting about {}?",
    "Write a short story in which {} plays a part, and say at the end what it teaches.{}",
)
_CONTEXT = (
    " Bear in mind that the reader is curious but in a hurry, knows little of the matter, and"
    " likes examples from daily life better than definitions."
)


def prompts(model: str, count: int) -> list[list[int]]:
    """The first `count` of 32 chats about the same things always, as token ids."""
    text = load_text(model)
    found = []
    for number in range(count):
        subject = _SUBJECTS[number % len(_SUBJECTS)]
        length = number // 4  # the later, the longer
        question = _QUESTIONS[number % 2].format(subject, _CONTEXT * length)
        chat = text.chat_prompt([{"role": "user", "content": question}])
        found.append(text.encode(chat, add_special_tokens=False))
    return found
