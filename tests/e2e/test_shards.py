"""Workers that keep their heads in several pools, from a request over HTTP to its text."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.site import DECODE, PREFILL, Site, serve, worker
from tests.emulation.desk import bundled_model

pytestmark = pytest.mark.slow

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
PROMPT = "Here is a list of all the planets, with what each of them is known for. Mercury is"


@contextlib.contextmanager
def pair(
    folder: Path, prefill_shards: int, decode_shards: int, transport: str, **more: Any
) -> Iterator[Site]:
    """A prefill and a decode worker with so many pools each, of unlike layouts."""

    def one(role: str, shards: int, axes: dict[str, Any], **more: Any) -> dict[str, Any]:
        options = {"model": bundled_model(), "dtype": "float32", "pool_tokens": 4096, **axes}
        return worker(
            role, "emulation", {**options, "shards": shards}, transports=[transport], **more
        )

    workers = {
        "prefill": one("prefill", prefill_shards, PREFILL, **more),
        "decode": one("decode", decode_shards, DECODE),
    }
    with serve(folder, {"workers": workers}) as site:
        site.until(lambda: _met(site))
        yield site


def _met(site: Site) -> Any:
    _, shown = site.request("/admin/workers")
    return [it["plan"] for it in shown["pairs"] if it["transport"]]


def texts(site: Site) -> list[str]:
    prompts = (PROMPT, PROMPT * 6)
    answers = [
        site.complete(prompt, max_tokens=24, temperature=0, n=n)
        for prompt, n in zip(prompts, (1, 2), strict=True)
    ]
    return [choice["text"] for answer in answers for choice in answer["choices"]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with pair(tmp_path_factory.mktemp("whole"), 1, 1, "tcp") as site:
        return texts(site)


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [(3, 1, "tcp"), (1, 3, "shm"), (3, 3, "tcp"), (3, 1, "shm")],
)
def test_the_text_is_that_of_one_pool_on_either_side(
    tmp_path: Path, expected: list[str], prefill: int, decode: int, transport: str
) -> None:
    with pair(tmp_path, prefill, decode, transport) as site:
        assert texts(site) == expected
        (plan,) = _met(site)
        assert plan.startswith(f"{prefill} to {decode} pools; ")
        handed = [it["bytes"] for it in site.events("prefill", "handoff.committed")]
        token = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
        assert len(handed) == 2
        assert all(it and not it % token for it in handed)
        site.until(site.balanced)


def test_one_part_that_was_damaged_fails_its_handoff_which_is_done_again(
    tmp_path: Path, expected: list[str]
) -> None:
    with pair(tmp_path, 3, 1, "tcp", faults="flip_bit@2") as site:
        assert texts(site) == expected
        failed = site.events("prefill", "handoff.failed")
        assert [it["cause"].endswith("the pool holds something else") for it in failed] == [True]
        assert len(site.events("prefill", "handoff.committed")) == 2
        site.until(site.balanced)
