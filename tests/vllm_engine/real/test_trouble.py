"""vLLM's process killed or stopped at work, and jobs that nobody wants any more."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends.protocol import Sampling
from tests.e2e.site import Site, serve, worker
from tests.e2e.test_processes_die import Stream
from tests.engine.desk import clean
from tests.life.cluster import Cluster, Heard, cluster
from tests.support.prompts import STORY, prompts

TOKENS = 24
LOAD_SECONDS = 240
HANG_SECONDS = 15


@pytest.fixture(scope="module")
def site(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two workers for either phase, one of each on vLLM: whichever falls, the other goes on.

    The other has room for three requests at a time, so that of six some must go to vLLM.
    """
    shared = {"dtype": "float32", "threads": 1}
    torch = {**shared, "pool_tokens": 640}
    vllm = {**shared, "context_tokens": 1000, "cache_tokens": 8192, "pool_tokens": 8192}
    watched = {"step_timeout_seconds": HANG_SECONDS}
    config = {
        "model": {"source": str(folder), "name": Site.model},
        "workers": {
            "p": worker("prefill", "vllm", vllm, **watched),
            "q": worker("prefill", "emulation", torch),
            "d": worker("decode", "vllm", vllm, **watched),
            "e": worker("decode", "emulation", torch),
        },
        "gateway": {"request_timeout_seconds": 300},
        "queue": {"lease_seconds": 5},
    }
    with serve(tmp_path_factory.mktemp("site"), config, LOAD_SECONDS) as running:
        yield running


def engine_of(site: Site, name: str) -> psutil.Process:
    """The process in which a worker's vLLM runs."""
    (found,) = site.parts[name].children()
    return found


def at_work(site: Site, name: str) -> bool:
    """Whether a worker's vLLM holds blocks of its own for somebody just now."""
    status, book = site.request("/debug/ledger")
    assert status == 200
    held = [it["holders"] for it in book["workers"] if it["worker"] == name]
    return any(holder["reason"] == "engine" for holders in held for holder in holders)


def streams(site: Site) -> list[Stream]:
    made = [Stream(site, f"{number}. {STORY}Then", TOKENS) for number in range(6)]
    for one in made:
        one.body |= {"temperature": 0, "ignore_eos": True}
    return made


def settled(site: Site) -> None:
    site.until(lambda: set(site.parts) >= {"p", "q", "d", "e", "gateway"}, LOAD_SECONDS)
    site.until(lambda: len(site.request("/admin/workers")[1]["workers"]) == 4, LOAD_SECONDS)
    site.until(site.balanced, 60)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("name", ["d", "p"])
def test_an_engine_that_is_killed_or_hangs_costs_no_client_its_answer(
    site: Site, name: str, how: signal.Signals
) -> None:
    settled(site)
    expected = [one.run().text for one in streams(site)]
    engine, old = engine_of(site, name), site.parts[name].pid
    asked = streams(site)
    with ThreadPoolExecutor(len(asked)) as pool:
        running = [pool.submit(one.run) for one in asked]
        site.until(lambda: at_work(site, name), 60)
        os.kill(engine.pid, how)
        for one in running:
            one.result(240)
    assert [one.error for one in asked] == [None] * len(asked)
    assert all(one.whole for one in asked)
    assert [one.text for one in asked] == expected
    site.until(lambda: name in site.parts and site.parts[name].pid != old, 60)
    assert not psutil.pid_exists(engine.pid) or engine.status() == psutil.STATUS_ZOMBIE
    (broken,) = site.events(name, "worker.broken")[-1:]
    assert ("SIGKILL" if how is signal.SIGKILL else "engine") in broken["cause"]
    settled(site)


@pytest.mark.parametrize("pair", ["torch vllm", "vllm torch", "vllm vllm", "vllm"])
async def test_what_is_cancelled_at_any_stage_leaves_nothing_and_harms_no_other(
    pair: str, partners: Any, vllm: Any, redis_url: str
) -> None:
    async with cluster(redis_url) as made:
        await start(made, pair, partners, vllm)
        long = list(max(prompts(), key=len))
        wishes = {"sampling": Sampling(temperature=0.0, ignore_eos=True), "seconds": 600.0}
        calm = Heard()
        began = time.monotonic()
        await made.carry(made.job(long[:300], max_tokens=24, **wishes), calm)
        lasted = time.monotonic() - began
        other = Heard()
        unharmed = asyncio.ensure_future(
            made.carry(made.job(long[:300], max_tokens=24, **wishes), other)
        )
        for part in range(12):
            job = made.job(long[part:], max_tokens=24, n=1 + part % 2, **wishes)
            carrying = asyncio.ensure_future(made.carry(job, Heard()))
            await asyncio.sleep(lasted * part / 12)
            carrying.cancel()
            await asyncio.wait([carrying])
        await unharmed
        assert other.tokens == calm.tokens
        await clean(made, 20.0)
        await vllm["p"].idle()
        await vllm["d"].idle()


async def start(made: Cluster, pair: str, partners: Any, vllm: Any) -> None:
    kinds = pair.split()
    if len(kinds) == 1:
        await made.start("b", "both", backend=vllm["d"])
        await made.until(lambda: made.fleet.snapshot().workers)
        return
    for name, role, kind in zip("pd", ("prefill", "decode"), kinds, strict=True):
        backend = vllm[name] if kind == "vllm" else partners[kind]
        await made.start(name, role, backend=backend, host={"step_tokens": 128})
    await made.paired()
