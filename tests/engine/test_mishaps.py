"""Whatever moment an engine, a client or a worker picks to fail: right text, nothing left."""

import asyncio
from typing import Any

import pytest

from backends.api import BackendMisconfigured, Output, PrefillJob, Row
from backends.host.plugins import construct, load_backend
from gateway.life.states import State
from tests.engine.desk import clean, engine, start_pair, truth
from tests.engine.small import SmallEngine, Work
from tests.life.cancels import _reach
from tests.life.cluster import Cluster, Heard, cluster

PROMPT = list(range(3, 120))
SLOW = {"step_seconds": 0.003, "prefill_seconds_per_token": 0.0002, "chunk_tokens": 20}
ENDLESS = {**SLOW, "step_seconds": 0.2}
"""200 tokens take longer than a test waits for the end of what it has cancelled."""

STATES = (State.QUEUED, State.PLACED, State.PREFILLING, State.HANDING_OVER, State.DECODING)


async def text(made: Cluster, n: int, tokens: int) -> Heard:
    heard = Heard()
    await made.carry(made.job(PROMPT, n=n, max_tokens=tokens), heard)
    assert heard.tokens == truth(PROMPT, n, tokens)
    return heard


@pytest.mark.parametrize("pair", ["engine engine", "engine", "stepped engine", "engine stepped"])
@pytest.mark.parametrize("state", STATES)
async def test_a_cancel_at_any_point_frees_everything(
    redis_url: str, pair: str, state: State
) -> None:
    async with cluster(redis_url) as made:
        speed = ENDLESS if state is State.DECODING else SLOW
        await start_pair(made, pair, **speed, linger_seconds=0.02)
        for delay in (0.0, 0.004, 0.01):
            job = made.job(PROMPT, n=3, max_tokens=200)
            carrying = asyncio.ensure_future(made.carry(job, Heard()))
            await _reach(made, job, carrying, state)
            await asyncio.sleep(delay)
            carrying.cancel()
            await asyncio.wait([carrying])
            await clean(made)
        await text(made, 1, 8)


async def test_a_stop_frees_one_sequence_and_no_other(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", **ENDLESS)
        heard = Heard(stop_after=5)
        await made.carry(made.job(PROMPT, n=2, max_tokens=200), heard)
        assert heard.tokens == truth(PROMPT, 2, 5)
        await clean(made)


@pytest.mark.parametrize("when", [State.PREFILLING, State.HANDING_OVER, State.DECODING])
@pytest.mark.parametrize("victim", ["p", "d"])
async def test_an_engines_worker_that_dies_costs_time_and_no_token(
    redis_url: str, when: State, victim: str
) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", **SLOW)
        heard = Heard()
        job = made.job(PROMPT, n=2, max_tokens=40)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await _reach(made, job, carrying, when)
        if when is State.DECODING:
            await made.until(lambda: len(heard.tokens.get(1, ())) > 3)
        await made.kill(victim)
        role = "prefill" if victim == "p" else "decode"
        await made.start(victim, role, backend=engine(**SLOW))
        await carrying
        assert heard.tokens == truth(PROMPT, 2, 40)
        await clean(made)


async def test_an_engine_that_drains_gives_its_sequences_back(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", **SLOW)
        await made.start("d2", "decode", host={"drain_seconds": 0.1}, backend=engine(**SLOW))
        await made.paired(2)
        heards = [Heard(), Heard()]
        jobs = [made.job(PROMPT, n=2, max_tokens=600) for _ in heards]
        carrying = [
            asyncio.ensure_future(made.carry(job, heard))
            for job, heard in zip(jobs, heards, strict=True)
        ]
        await made.until(lambda: all(len(it.tokens.get(1, ())) > 2 for it in heards))
        assert made.hosts["d2"]._requests.steps.running
        made.hosts["d2"].drain()
        await asyncio.wait(carrying)
        assert all(heard.tokens == truth(PROMPT, 2, 600) for heard in heards)
        await made._running.pop("d2")
        del made.hosts["d2"]
        await clean(made)


async def test_a_paused_sequence_goes_on_where_it_was(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", **SLOW)
        heard = Heard()
        job = made.job(PROMPT, max_tokens=600)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await made.until(lambda: len(heard.tokens.get(0, ())) > 2)
        made.relay.pause(job, 0, True)
        loop: Any = made.hosts["d"]._requests.steps
        await made.until(lambda: any(len(one.tokens) > 5 for one in loop._untold._jobs))
        before = len(heard.tokens[0])
        made.relay.pause(job, 0, False)
        await carrying
        assert before < 600
        assert heard.tokens == truth(PROMPT, 1, 600)
        await clean(made)


async def test_a_sequence_paused_for_long_is_prefilled_again_and_repeats_nothing(
    redis_url: str,
) -> None:
    async with cluster(redis_url) as made:
        await start_pair(made, "engine engine", step_seconds=0.001)
        heard = Heard()
        job = made.job(PROMPT, max_tokens=1500)
        carrying = asyncio.ensure_future(made.carry(job, heard))
        await heard.first.wait()
        made.relay.pause(job, 0, True)
        requests = made.hosts["d"]._requests
        await made.until(lambda: requests.steps.pins.held)  # the engine has taken it up
        await made.until(lambda: requests.steps.running and not requests.steps.pins.held)
        made.relay.pause(job, 0, False)
        await carrying
        assert requests.landings._count > 1
        assert heard.tokens == truth(PROMPT, 1, 1500)
        await clean(made)


class Faulty(SmallEngine):
    """Fails once, in one way."""

    failing: str = ""

    def once(self, how: str) -> bool:
        hit = self.failing == how
        self.failing = "" if hit else self.failing
        return hit

    def _step(self, rows: list[Row]) -> list[Output]:
        if self.once("raises in a step"):
            raise RuntimeError("the device fell over")
        return super()._step(rows)

    def _take(self, job: Any, tokens: int) -> None:
        if self.once("refuses"):
            raise RuntimeError("not today")
        super()._take(job, tokens)

    def _export(self, work: Work, job: PrefillJob, start: int) -> None:
        if work.done == len(work.tokens) and self.once("exports too little"):
            return
        super()._export(work, job, start)

    def _prefilled(self, work: Work, output: Output) -> None:
        if self.once("answers twice"):
            super()._prefilled(work, output)
            self.events.ended(work.name)
        super()._prefilled(work, output)

    def _finish(self, work: Work) -> None:
        if self.once("speaks of strangers"):
            for name in ("nobody", work.name + "?"):
                self.events.prefilled(name, Output())
                self.events.imported(name)
                self.events.ready(name, 0, 1)
                self.events.ended(name)
        super()._finish(work)


FAULTS = {
    "raises in a step": "pd",
    "refuses": "pd",
    "exports too little": "p",
    "answers twice": "p",
    "speaks of strangers": "pd",
}


@pytest.mark.parametrize(
    ("fault", "worker"), [(fault, at) for fault, places in FAULTS.items() for at in places]
)
async def test_one_fault_of_an_engine_costs_a_prefill_at_most(
    redis_url: str, fault: str, worker: str
) -> None:
    async with cluster(redis_url) as made:
        engines = {name: engine(Faulty, **SLOW) for name in "pd"}
        await made.start("p", "prefill", backend=engines["p"])
        await made.start("d", "decode", backend=engines["d"])
        await made.paired()
        engines[worker].failing = fault
        await text(made, 2, 12)
        await made.until(lambda: not engines[worker].failing)
        await text(made, 1, 12)
        await clean(made)


def test_a_plug_in_is_held_to_the_contract_that_it_states() -> None:
    class Halved(SmallEngine):
        pins = None  # type: ignore[assignment]

        def __getattribute__(self, name: str) -> Any:
            if name in ("pins", "abort"):
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(BackendMisconfigured, match="lacks abort, pins"):
        construct("halved", Halved, {})
    assert construct("small", SmallEngine, {}).info.kind == "engine"


def test_a_role_that_an_engine_cannot_fill_is_refused_at_once(monkeypatch: Any) -> None:
    class Point:
        @staticmethod
        def load() -> Any:
            return SmallEngine

    monkeypatch.setattr("backends.host.plugins.find_backend", lambda _: Point)
    options = {"phases": ("prefill",)}
    assert load_backend("half", options, role="prefill").info.phases == {"prefill"}
    for role in ("decode", "both"):
        with pytest.raises(BackendMisconfigured, match="does not decode"):
            load_backend("half", options, role=role)
