"""vLLM in processes that outlive the workers which host them: loading takes half a minute."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.export import export
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


@pytest.fixture(scope="session")
def torch_engine() -> Iterator[Kept]:
    from tests.emulation.desk import bundled_model, engine

    backend = engine(model=bundled_model(), dtype="float32", threads=1, pool_tokens=8192)
    yield Kept(backend)
    backend.close()
