"""A prefill worker that stands still in the middle of a handoff, on shared memory."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.e2e.site import Site, serve, synthetic
from tests.support.patience import PATIENCE_SECONDS


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    workers = synthetic()
    workers["prefill"]["faults"] = "delay@1:1.5"  # six seconds for four layers
    for one in workers.values():
        one["transports"] = ["shm"]
    workers["decode"]["quarantine_share"] = 0.001
    with serve(tmp_path, {"workers": workers, "gateway": {"request_timeout_seconds": 60}}) as it:
        yield it


def holders(site: Site, reason: str) -> list[Any]:
    status, book = site.request("/debug/ledger")
    assert status == 200
    return [
        holder for one in book["workers"] for holder in one["holders"] if holder["reason"] == reason
    ]


def quarantined(site: Site) -> list[Any]:
    return holders(site, "quarantine")


def pair(site: Site) -> Any:
    status, shown = site.request("/admin/workers")
    assert status == 200
    return shown["pairs"][0] if shown["pairs"] else None


def test_its_blocks_wait_for_it_and_are_free_when_it_goes_on(site: Site) -> None:
    site.until(lambda: (pair(site) or {}).get("transport") == "shm")
    prefill = site.parts["prefill"]
    body = {"model": site.model, "prompt": "x " * 900, "max_tokens": 50, "stream": True}
    with urlopen(site.post("/v1/completions", body), timeout=4 * PATIENCE_SECONDS):
        site.until(lambda: holders(site, "landing"))
        time.sleep(2)  # the first layer is moved, and three are not
        prefill.suspend()
    try:
        site.until(lambda: bool(quarantined(site)))
        (held,) = quarantined(site)
        assert held["owner"].endswith(" from prefill")
        site.until(lambda: pair(site)["shunned"])
        assert pair(site)["transport"] == "shm"
        time.sleep(1.5)
        assert quarantined(site) == [held]
    finally:
        prefill.resume()
    site.until(lambda: site.balanced() and not pair(site)["shunned"])
    assert site.complete("and now")["choices"][0]["finish_reason"] == "length"


def test_its_blocks_are_free_as_soon_as_it_is_killed(site: Site) -> None:
    site.until(lambda: (pair(site) or {}).get("transport") == "shm")
    prefill = site.parts["prefill"]
    body = {"model": site.model, "prompt": "x " * 900, "max_tokens": 50, "stream": True}
    with urlopen(site.post("/v1/completions", body), timeout=4 * PATIENCE_SECONDS):
        site.until(lambda: holders(site, "landing"))
        time.sleep(2)
        prefill.suspend()
    site.until(lambda: bool(quarantined(site)))
    prefill.kill()
    site.until(lambda: not quarantined(site), PATIENCE_SECONDS)  # its lease lasts a minute
    site.until(site.balanced)
    site.until(lambda: (pair(site) or {}).get("transport") == "shm")
    assert site.complete("and now")["choices"][0]["finish_reason"] == "length"
