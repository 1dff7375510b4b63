"""vLLM in processes that outlive the workers which host them: loading takes half a minute."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gateway.cli.export import export
from gateway.cli.model import find_model
from tests.control.conftest import LiveServer, programs
from tests.vllm_engine.real.kept import Kept, KeptEngine

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(next(iter(programs().values())), Path(folder))
        asyncio.run(server.start())
        yield server.url
        server.kill()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as vLLM reads it."""
    path = tmp_path_factory.mktemp("model") / "smollm2"
    export("bundled", path)
    return path


@pytest.fixture(scope="session")
def vllm(folder: Path) -> Iterator[dict[str, KeptEngine]]:
    """Two engines in float32, one to prefill and one to decode."""
    from backends.vllm import VllmBackend

    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "threads": 1,
        "context_tokens": 1000,
        "cache_tokens": 8192,
        "pool_tokens": 8192,
    }
    made = {name: KeptEngine(VllmBackend(**options)) for name in "pd"}
    yield made
    for each in made.values():
        each.end()


class Partners:
    """The engines that vLLM is paired with, each made when it is first wanted.

    What only some machines have (`llamacpp` takes a compiler) is skipped where it is not there.
    """

    KINDS: ClassVar[dict[str, tuple[str, str, dict[str, Any]]]] = {
        "torch": ("torch", "backends.emulation:EmulationBackend", {"dtype": "float32"}),
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


@pytest.fixture(scope="session")
def partners() -> Iterator[Partners]:
    made = Partners()
    yield made
    made.close()
