"""The bundled model in llama.cpp and in the engines that it meets, each made once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from backends.testing import Maker
from backends.testing.desk import Desk
from tests.emulation.desk import bundled_model
from transfer.warming import warm_up

ABSENT = "llama-cpp-python is not installed; `make test-llamacpp` compiles it"
FULL = {"weights": "float32", "kv_dtype": "float32"}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def made(name: str, seed: int = 0, **options: Any) -> Iterator[Desk]:
    warm_up()  # or the first handoff waits for compilers
    desk = Desk(Maker.of(name, {"model": bundled_model(), "threads": 1, **options}).make(), seed)
    yield desk
    desk.close()


@pytest.fixture(scope="session")
def full() -> Iterator[Desk]:
    """llama.cpp in float32 throughout."""
    yield from made("backends.llamacpp:LlamaCppBackend", pool_tokens=4096, **FULL)


@pytest.fixture(scope="session")
def shipped() -> Iterator[Desk]:
    """llama.cpp with the weights as they are stored, Q4_1, and KV in float16."""
    yield from made("backends.llamacpp:LlamaCppBackend", pool_tokens=4096)


@pytest.fixture(scope="session")
def torch() -> Iterator[Desk]:
    """The torch engine in float32, with blocks and axes of another kind."""
    yield from made(
        "emulation", 1, dtype="float32", pool_tokens=4096, block_tokens=32,
        axes="block layer kv head token dim",
    )  # fmt: skip


@pytest.fixture(scope="session")
def onnx() -> Iterator[Desk]:
    """ONNX Runtime in float32."""
    yield from made("onnxruntime", 2, weights="float32", pool_tokens=4096)
