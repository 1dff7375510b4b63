"""SIGKILL of workers that own their scheduler and their memory, at the worst moments."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.killing import Killer, announced, pair
from tests.e2e.site import SYNTHETIC

ENGINE = {
    "backend": "small",
    "options": {
        **{name: value for name, value in SYNTHETIC.items() if name != "verify_kv"},
        "pool_tokens": 4096,
        "context_tokens": 2048,
    },
}


def engine(**more: Any) -> dict[str, Any]:
    """A worker that owns its scheduler and its memory."""
    return {**ENGINE, "options": {**ENGINE["options"], **more}}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return announced(tmp_path_factory.mktemp("plugins"), "small", "tests.engine.small:SmallEngine")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, plugins: Path) -> Iterator[Killer]:
    """An engine that prefills for another that decodes, arenas cut in unlike ways."""
    prefill = engine(block_tokens=32, arena_axes="layer kv block token head dim")
    folder = tmp_path_factory.mktemp("engines")
    with pair(folder, prefill, engine(block_tokens=16), plugins) as site:
        yield Killer(site, tokens=300)


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_an_engine_dies_during_a_handoff(engines: Killer, part: str) -> None:
    engines.during_a_handoff(part)


def test_an_engine_dies_while_it_decodes(engines: Killer) -> None:
    engines.while_decoding("decode")
