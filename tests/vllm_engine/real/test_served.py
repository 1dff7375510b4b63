"""A pair of stock vLLM servers behind Baton: what they say, and what happens when one falls."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.protocol import Sampling
from backends.vllm.served import VllmServedBackend
from loadtest.bench.process import descendants
from tests.life.cluster import Heard, cluster
from tests.support.kept import KeptEngine
from tests.support.prompts import prompts
from tests.vllm_engine import servers

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
SILENCE_SECONDS = 300.0
"""The first log probabilities that a server is asked for have it compile something."""

LONG = {"max_tokens": 200, "sampling": GREEDY, "seconds": 900.0}


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of a prefill and a decode server, of one thread each.

    Several threads wait for each other after every operator, which takes long where others work.
    """
    every = sorted(os.sched_getaffinity(0))
    cores = frozenset(every[:1]), frozenset(every[-1:])
    logs = tmp_path_factory.mktemp("servers")
    with servers.pair(folder, logs, cores=cores, dtype="float32") as both:
        yield both


@pytest.fixture(scope="module")
def fleet(folder: Path, pair: tuple[str, str]) -> Iterator[KeptEngine]:
    prefill, decode = pair
    made = KeptEngine(
        VllmServedBackend(
            model=str(folder), prefill=prefill, decode=decode, silence_seconds=SILENCE_SECONDS
        )
    )
    yield made
    made.end()


async def one_worker(made: Any, backend: Any) -> None:
    await made.start(
        "b", "both", backend=backend, host={"step_timeout_seconds": 2 * SILENCE_SECONDS}
    )
    await made.until(lambda: made.fleet.snapshot().workers)


async def test_the_pair_says_what_vllm_says_that_baton_hands_kv_to(
    fleet: KeptEngine, vllm: Any, redis_url: str
) -> None:
    texts = []
    for backend in (fleet, vllm["d"]):
        async with cluster(redis_url) as made:
            await one_worker(made, backend)
            found = []
            for prompt in prompts()[::4]:
                heard = Heard()
                job = made.job(list(prompt), max_tokens=16, sampling=GREEDY, seconds=900.0)
                timeline = await made.carry(job, heard)
                assert timeline.retries == 0
                found.append(heard.tokens[0])
            texts.append(found)
            await made.balanced(10.0)
    assert texts[0] == texts[1]


async def test_logprobs_and_several_sequences_come_through(
    fleet: KeptEngine, redis_url: str
) -> None:
    async with cluster(redis_url) as made:
        await one_worker(made, fleet)
        heard = Heard()
        wishes = Sampling(temperature=0.0, ignore_eos=True, logprobs=3)
        job = made.job(
            list(prompts()[3]), n=2, max_tokens=6, sampling=wishes, seconds=900.0, prompt_logprobs=1
        )
        await made.carry(job, heard)
        assert heard.tokens[0] == heard.tokens[1]
        assert len(heard.prompt) == len(prompts()[3]) - 1
        for logprob in heard.logprobs:
            assert logprob is not None
            assert logprob.top[0] == (logprob.token, logprob.logprob)
            assert len(logprob.top) == 3
        await made.balanced(10.0)


async def test_a_request_that_is_cancelled_leaves_nothing_here(
    fleet: KeptEngine, redis_url: str
) -> None:
    async with cluster(redis_url) as made:
        await one_worker(made, fleet)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job(list(prompts()[5]), **LONG), heard))
        await asyncio.wait_for(heard.first.wait(), 300)
        carrying.cancel()
        await asyncio.wait([carrying])
        await made.balanced(10.0)
        await fleet.idle()


async def test_a_decode_server_that_is_killed_fails_the_request_and_not_the_worker(
    fleet: KeptEngine, pair: tuple[str, str], redis_url: str
) -> None:
    """The last test of this file: the server is gone afterwards."""
    async with cluster(redis_url, max_retries=1) as made:
        await one_worker(made, fleet)
        heard = Heard()
        carrying = asyncio.ensure_future(made.carry(made.job(list(prompts()[5]), **LONG), heard))
        await asyncio.wait_for(heard.first.wait(), 300)
        kill_listener(pair[1])
        with pytest.raises(Exception, match=r"engine_failed|failed|retries"):
            await asyncio.wait_for(carrying, 300)
        await made.balanced(10.0)
        await fleet.idle()


def kill_listener(address: str) -> None:
    """SIGKILL the server that listens there, with all that it has started."""
    import psutil

    port = int(address.rpartition(":")[2])
    (pid,) = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }
    for process in descendants(pid):
        os.kill(process, signal.SIGKILL)
