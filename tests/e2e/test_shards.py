"""Workers that keep their heads in several pools, from a request over HTTP to its text."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.site import DECODE, PREFILL, Site, serve, worker
from tests.emulation.desk import bundled_model

pytestmark = pytest.mark.slow

TOKEN_BYTES = 30 * 2 * 3 * 64 * 4
PROMPT = "Here is a list of all the planets, with what each of them is known for. Mercury is"


@contextlib.contextmanager
def pair(
    folder: Path, prefill_shards: int, decode_shards: int, transport: str, faults: str = ""
) -> Iterator[Site]:
    """A prefill and a decode worker with so many pools each, of unlike layouts."""

    def one(role: str, shards: int, axes: dict[str, Any], **more: Any) -> dict[str, Any]:
        options = {"model": bundled_model(), "dtype": "float32", "pool_tokens": 2048, **axes}
        options["shards"] = shards
        return worker(role, "emulation", options, transports=[transport], threads=1, **more)

    workers = {
        "prefill": one("prefill", prefill_shards, PREFILL, faults=faults),
        "decode": one("decode", decode_shards, DECODE),
    }
    with serve(folder, {"workers": workers}) as site:
        site.until(lambda: plans(site))
        yield site


def plans(site: Site) -> list[str]:
    _, shown = site.request("/admin/workers")
    return [it["plan"] for it in shown["pairs"] if it["transport"]]


def texts(site: Site) -> list[str]:
    answer = site.complete(PROMPT, max_tokens=12, temperature=0, n=2)
    return [choice["text"] for choice in answer["choices"]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with pair(tmp_path_factory.mktemp("whole"), 1, 1, "tcp") as site:
        return texts(site)


def handed(site: Site) -> list[bool]:
    """Of each handoff: whether it has moved all heads of a whole number of tokens."""
    sizes = [it["bytes"] for it in site.events("prefill", "handoff.committed")]
    return [bool(it) and not it % TOKEN_BYTES for it in sizes]


def test_three_pools_to_one_over_tcp_of_which_one_part_is_damaged(
    tmp_path: Path, expected: list[str]
) -> None:
    """The handoff fails, is done again, and the text is that of one pool to one."""
    with pair(tmp_path, 3, 1, "tcp", faults="flip_bit@2") as site:
        assert plans(site)[0].startswith("3 to 1 pools; ")
        assert texts(site) == expected
        (failed,) = site.events("decode", "landing.failed")
        assert failed["code"] == "DigestMismatch"
        assert handed(site) == [True]
        site.until(site.balanced)


def test_one_pool_to_three_through_shared_memory(tmp_path: Path, expected: list[str]) -> None:
    with pair(tmp_path, 1, 3, "shm") as site:
        assert plans(site)[0].startswith("1 to 3 pools; ")
        assert texts(site) == expected
        assert handed(site) == [True]
        site.until(site.balanced)
