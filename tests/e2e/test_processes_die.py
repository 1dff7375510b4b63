"""SIGKILL of each process while streams run; what is under load leaves nothing behind."""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from tests.e2e.site import Site, serve, synthetic
from tests.e2e.streams import Stream, run_all


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    config = {
        "workers": synthetic(),
        "gateway": {"request_timeout_seconds": 240},
        "queue": {"lease_seconds": 3},
    }
    with serve(tmp_path_factory.mktemp("site"), config) as running:
        yield running


def settled(site: Site) -> None:
    site.until(site.balanced)
    site.until(lambda: set(site.parts) == {"gateway", "redis", "prefill", "decode"})


def test_sixty_four_streams_finish_and_leave_nothing(site: Site) -> None:
    site.complete("warm up")
    settled(site)
    gateway = site.parts["gateway"]
    files = {name: part.num_fds() for name, part in site.parts.items() if name != "redis"}
    streams = [Stream(site, f"{i} " * (1 + 9 * i), 40, n=1 + i % 3) for i in range(64)]
    run_all(streams)
    assert all(stream.whole for stream in streams), [s.error for s in streams if not s.whole]
    settled(site)
    site.until(
        lambda: all(site.parts[name].num_fds() <= count + 2 for name, count in files.items())
    )
    assert gateway.is_running()
    redis = site.redis()
    assert [key for key in redis.scan_iter() if redis.ttl(key) == -1] == []
    site.until(lambda: "baton_requests_running 0.0" in site.request("/metrics")[1])


@pytest.mark.parametrize("part", ["decode", "prefill", "redis"])
def test_a_killed_part_costs_no_client_its_answer(site: Site, part: str) -> None:
    expected = Stream(site, "tell me", 300, n=2).run().text
    streams = [Stream(site, "tell me", 300, n=2) for _ in range(8)]
    old = site.parts[part].pid
    # Without Redis nobody new is let in: all of them must be under way. Elsewhere some may wait.
    run_all(streams, lambda: site.kill(part), under_way=8 if part == "redis" else 1)
    for stream in streams:
        assert stream.whole or stream.typed, vars(stream)
        if stream.whole:
            assert stream.text == expected
    assert all(stream.whole for stream in streams), [s.error for s in streams]
    site.until(lambda: part in site.parts and site.parts[part].pid != old)
    site.until(site.ready)
    assert site.complete("and now")["choices"][0]["finish_reason"] == "length"
    settled(site)


def test_a_killed_gateway_is_started_again(site: Site) -> None:
    streams = [Stream(site, "tell me", 3000) for _ in range(4)]  # half a minute, if it lives
    run_all(streams, lambda: site.kill("gateway"), under_way=4)
    assert not any(stream.done for stream in streams)  # a cut stream never looks whole
    site.until(site.ready)
    settled(site)
    assert site.complete("and now")["choices"][0]["finish_reason"] == "length"


def test_without_redis_a_new_request_is_told_so_at_once(site: Site) -> None:
    site.until(site.ready)
    site.parts["redis"].suspend()
    stopped = psutil.Process(site.parts["redis"].pid)
    try:
        began = time.monotonic()
        status, answer = site.request("/v1/completions", {"model": site.model, "prompt": "x"})
        assert status == 503, answer
        assert time.monotonic() - began < 10
    finally:
        stopped.resume()
    site.until(site.ready)
    assert site.complete("and now")["choices"]


def test_a_client_that_leaves_frees_everything_long_before_its_end(site: Site) -> None:
    settled(site)
    body = {"model": site.model, "prompt": "x " * 2000, "max_tokens": 5000, "stream": True}
    answers = [urlopen(site.post("/v1/completions", body), timeout=120) for _ in range(4)]
    for answer in answers:
        assert answer.readline()
    assert not site.balanced()
    for answer in answers:
        answer.close()
    site.until(site.balanced, 20)  # 5,000 tokens take 50 s at least


def test_damaged_handoffs_are_caught_and_answered_all_the_same(tmp_path: Path) -> None:
    workers = synthetic(step_seconds=0.001)
    workers["prefill"]["faults"] = "flip_bit@1,missing_page@3,swapped_layer@5"
    with serve(tmp_path, {"workers": workers}) as site:
        for turn in range(3):
            answer = site.complete(f"a prompt of some length, {turn} " * 9, seed=1, n=2)
            assert len(answer["choices"]) == 2
        again = [site.complete("a prompt", seed=1)["choices"][0]["text"] for _ in range(2)]
        assert again[0] == again[1]
        failures = [event["code"] for event in site.events("decode", "landing.failed")]
        assert failures == ["DigestMismatch"] * 3
        site.until(site.balanced)
