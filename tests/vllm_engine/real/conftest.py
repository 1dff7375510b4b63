"""vLLM in processes that outlive the workers which host them: loading takes half a minute.

They end with their module all the same, as each takes up to two GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gateway.cli.export import export
from gateway.cli.model import find_model
from tests.support.kept import Kept, KeptEngine

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as vLLM reads it."""
    path = tmp_path_factory.mktemp("model") / "smollm2"
    export("bundled", path)
    return path


class Engines:
    """Each made when it is first wanted: `p` and `d` in float32, `h` in bfloat16."""

    DTYPES: ClassVar[dict[str, str]] = {"p": "float32", "d": "float32", "h": "bfloat16"}

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, KeptEngine] = {}

    def __getitem__(self, name: str) -> KeptEngine:
        from backends.vllm import VllmBackend

        if name not in self._made:
            options: dict[str, Any] = {
                "model": str(self._folder),
                "dtype": self.DTYPES[name],
                "threads": 1,
                "context_tokens": 1000,
                "cache_tokens": 8192,
                "pool_tokens": 8192,
            }
            self._made[name] = KeptEngine(VllmBackend(**options))
        return self._made[name]

    def close(self) -> None:
        for each in self._made.values():
            each.end()


@pytest.fixture(scope="module")
def vllm(folder: Path) -> Iterator[Engines]:
    made = Engines(folder)
    yield made
    made.close()


class Partners:
    """The engines that vLLM is paired with, each made when it is first wanted.

    What only some machines have (`llamacpp` takes a compiler) is skipped where it is not there.
    """

    KINDS: ClassVar[dict[str, tuple[str, str, dict[str, Any]]]] = {
        "torch": ("torch", "backends.emulation:EmulationBackend", {"dtype": "float32"}),
        "torch in bfloat16": (
            "torch",
            "backends.emulation:EmulationBackend",
            {"dtype": "bfloat16"},
        ),
        "onnxruntime": (
            "onnxruntime",
            "backends.onnxruntime:OnnxRuntimeBackend",
            {"weights": "float32"},
        ),
        "llamacpp": (
            "llama_cpp",
            "backends.llamacpp:LlamaCppBackend",
            {"weights": "float32", "kv_dtype": "float32"},
        ),
    }

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Kept:
        if name not in self._made:
            library, place, options = self.KINDS[name]
            module, _, attribute = place.partition(":")
            if not (find_spec(library) and find_spec(module)):
                pytest.skip(f"{library} is not installed here")
            make = getattr(import_module(module), attribute)
            model = str(find_model("bundled"))
            self._made[name] = make(model=model, threads=1, pool_tokens=8192, **options)
        return Kept(self._made[name])

    def close(self) -> None:
        for backend in self._made.values():
            backend.close()


@pytest.fixture(scope="module")
def partners() -> Iterator[Partners]:
    made = Partners()
    yield made
    made.close()
