"""What fails again and again is left alone for a while, then tried once."""

import asyncio
from collections.abc import Callable

import pytest

from gateway.life.breakers import (
    FAILURES,
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    WINDOW_SECONDS,
    Breaker,
    Breakers,
    culprit,
)
from gateway.server import workers
from tests.life.cluster import DECODE, PREFILL, Heard, cluster
from tests.support.patience import LONG_SECONDS


def tripped(at: float = 0.0) -> Breaker:
    """A breaker that has just opened, at `at`."""
    breaker = Breaker()
    for number in range(FAILURES):
        when = at - (FAILURES - 1 - number)
        opened = breaker.failed(when, "it fell over", when)
        assert opened == (number == FAILURES - 1)
    return breaker


def test_it_opens_after_some_failures_and_says_why() -> None:
    breaker = tripped(10.0)
    assert (breaker.state(10.0), breaker.admits(10.0)) == ("open", False)
    shown = breaker.shown(10.4)
    assert (shown.state, shown.reason, shown.retry_in_seconds) == ("open", "it fell over", 0.6)


def test_one_mishap_counts_once_however_many_it_hits() -> None:
    breaker = Breaker()
    for number in range(100):
        assert not breaker.failed(1.0 + number, "all that ran there", began=0.5)
    assert breaker.state(200.0) == "closed"


def test_failures_that_are_long_ago_are_forgotten() -> None:
    breaker = Breaker()
    for number in range(20):
        now = number * WINDOW_SECONDS / 1.9
        assert not breaker.failed(now, "now and then", now)


def test_it_stays_closed_while_most_goes_well() -> None:
    breaker = Breaker()
    for second in range(25):
        breaker.succeeded(second)
        breaker.succeeded(second)
        assert not breaker.failed(second + 0.5, "one in three", second)


def test_after_a_pause_one_request_is_let_through() -> None:
    breaker = tripped(0.0)
    now = FIRST_PAUSE_SECONDS
    assert breaker.admits(now)
    assert breaker.enter(now)
    assert not breaker.admits(now)
    assert not breaker.enter(now)
    breaker.leave()  # its client has left: nothing was learnt
    assert breaker.enter(now)
    assert breaker.succeeded(now)
    assert breaker.state(now) == "closed"
    assert (breaker.admits(now), breaker.enter(now)) == (True, False)
    assert breaker.shown(now).reason == ""


def test_a_trial_that_fails_opens_it_for_longer_and_longer() -> None:
    breaker, now = tripped(0.0), 0.0
    pause = FIRST_PAUSE_SECONDS
    for _ in range(8):
        now += pause
        assert breaker.state(now - 0.001) == "open"
        assert breaker.enter(now)
        assert breaker.failed(now, "again", now)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        assert breaker.state(now + pause) == "half_open"
    assert pause == LONGEST_PAUSE_SECONDS


def test_what_began_before_it_opened_changes_nothing() -> None:
    breaker = tripped(0.0)
    assert not breaker.succeeded(0.1)
    assert not breaker.failed(0.2, "another one", 0.1)
    assert breaker.state(0.3) == "open"
    assert breaker.reopens_at == FIRST_PAUSE_SECONDS


@pytest.mark.parametrize(
    ("phase", "code", "whose"),
    [
        ("handoff", "DigestMismatch", "pair"),
        ("handoff", "PeerLost", "pair"),
        ("handoff", "landing_expired", "pair"),
        ("prefill", "step_failed", "worker"),
        ("decode", "step_failed", "worker"),
        ("reserve", "full", "nobody"),
        ("prefill", "invalid", "nobody"),
        ("decode", "preempted", "nobody"),
        ("handoff", "draining", "nobody"),
        ("decode", "deadline", "nobody"),
        ("decode", "fenced", "nobody"),
        ("decode", "lost", "nobody"),
    ],
)
def test_a_failure_counts_against_whoever_is_to_blame(phase: str, code: str, whose: str) -> None:
    assert culprit(phase, code) == whose


class Clock:
    """A time that stands still, and what is to be done later."""

    def __init__(self) -> None:
        self.now = 0.0
        self.alarms: list[float] = []
        self.news = 0

    def later(self, at: float, call: Callable[[], None]) -> None:
        self.alarms.append(at)

    def changed(self) -> None:
        self.news += 1


def test_those_of_workers_that_are_gone_are_forgotten() -> None:
    clock = Clock()
    breakers = Breakers(lambda: clock.now, clock.later, clock.changed)
    for _ in range(FAILURES):
        for key in ("p", "d", ("p", "d")):
            breakers.failed(key, "why", clock.now)
        clock.now += 1
    assert clock.alarms == [clock.now - 1 + FIRST_PAUSE_SECONDS] * 3
    assert clock.news == 3
    clock.now -= 1
    assert [breakers.why(key) for key in ("p", ("p", "d"), "other")] == ["why", "why", ""]
    breakers.forget({"p"})
    assert breakers.shown("p").reason == "why"
    assert breakers.shown(("p", "d")).state == breakers.shown("d").state == "closed"


async def test_a_pair_that_damages_is_left_alone_until_a_trial_succeeds(redis_url: str) -> None:
    faults = ",".join(f"flip_bit@{n}" for n in range(1, FAILURES + 1))
    async with cluster(redis_url, max_retries=0) as made:
        await made.start("bad", "prefill", host={"faults": faults}, **PREFILL)
        await made.start("d", "decode", **DECODE)
        await made.paired()
        for _ in range(FAILURES):
            with pytest.raises(Exception, match="DigestMismatch"):
                await made.carry(made.job([1, 2, 3]), Heard())
        (pair,) = workers(made.fleet)["pairs"]
        assert pair["breaker"].state == "open"
        assert "DigestMismatch" in pair["breaker"].reason
        assert not made.fleet.snapshot().pairs
        heard = Heard()
        await made.carry(made.job([1, 2, 3]), heard)  # waits for the pause to be over
        assert len(heard.tokens[0]) == 20
        (pair,) = workers(made.fleet)["pairs"]
        assert pair["breaker"].state == "closed"
        assert {one["breaker"].state for one in workers(made.fleet)["workers"]} == {"closed"}


async def test_others_carry_what_a_bad_pair_would_have(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = "gateway.life.breakers.FIRST_PAUSE_SECONDS"
    monkeypatch.setattr(pause, LONG_SECONDS)  # it is not tried again
    async with cluster(redis_url, max_retries=8) as made:
        await made.start("bad", "prefill", host={"faults": "flip_bit@*"}, **PREFILL)
        await made.start("good", "prefill", **PREFILL)
        await made.start("d", "decode", **DECODE)
        await made.paired(2)
        retries: list[int] = []
        while made.fleet.breakers.admits(("bad", "d")):
            # Several at a time: one alone would go where handoffs are known to work.
            jobs = [made.carry(made.job([1, 2, 3]), Heard()) for _ in range(6)]
            retries += [timeline.retries for timeline in await asyncio.gather(*jobs)]
            assert len(retries) < 100
        timeline = await made.carry(made.job([1, 2, 3]), Heard())
        assert (timeline.retries, timeline.prefill_worker) == (0, "good")
        assert made.fleet.breakers.admits(("good", "d"))


async def test_a_client_that_leaves_trips_nothing(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", **PREFILL)
        await made.start("d", "decode", **DECODE, step_seconds=0.01)
        await made.paired()
        for _ in range(2 * FAILURES):
            heard = Heard()
            carrying = asyncio.ensure_future(made.carry(made.job([1, 2], max_tokens=500), heard))
            await heard.first.wait()
            carrying.cancel()
            await asyncio.wait([carrying])
        assert not made.fleet.breakers._breakers
