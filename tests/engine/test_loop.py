"""The loop around an engine that the tests play themselves, event by event."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from backends.api import (
    BackendError,
    DecodeJob,
    Events,
    Logprob,
    Output,
    PoolExhausted,
    PrefillJob,
    Sampled,
)
from backends.host.engine import EngineLoop
from backends.host.ledger import Holder, Ledger
from backends.host.loop import DeviceHangs, EngineDied, Item
from backends.host.untold import PAUSED_TOKENS
from backends.host.work import Held, Prefilling, Running, sequences_of
from tests.engine.desk import engine
from tests.host.test_control import spec

INFO = engine().info
LAYERS = INFO.layout.layers
PROMPT = [1] * 40


class Played:
    """An engine that does nothing but take jobs."""

    def __init__(self) -> None:
        self.info, self.pool = INFO, None
        self.jobs: dict[str, PrefillJob | DecodeJob] = {}
        self.aborted: list[str] = []
        self.held: dict[str, int] = {}
        self.refusal: Exception | None = None
        self.refusals = 1 << 30
        self.events: Events

    def start(self, events: Events) -> None:
        self.events = events

    def prefill(self, job: PrefillJob | DecodeJob) -> None:
        if self.refusal is not None and self.refusals > 0:
            self.refusals -= 1
            raise self.refusal
        self.jobs[job.name] = job

    decode = prefill

    def abort(self, job: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.aborted.append(job)

    def pins(self) -> dict[str, int]:
        return self.held

    def close(self) -> None:
        pass


class Told:
    """What the requests hear; as they do, it ends what is lost."""

    def __init__(self) -> None:
        self.ready: list[tuple[int, int, int]] = []
        self.outputs: list[Output] = []
        self.tokens: list[int] = []
        self.losses: list[tuple[str, str]] = []
        self.freed: list[Item] = []
        self.then: Callable[[Prefilling], None] = lambda _: None
        self.loop: EngineLoop

    def seated(self, work: Prefilling) -> None:
        pass

    def layer_ready(self, work: Prefilling, layer: int, start: int, end: int) -> None:
        self.ready.append((layer, start, end))

    def prefilled(self, work: Prefilling, output: Output) -> None:
        self.outputs.append(output)
        self.then(work)

    def decoded(self, results: list[tuple[Running, Sampled]]) -> None:
        assert len({running for running, _ in results}) == len(results)
        self.tokens += [sampled.token for _, sampled in results]

    def lost(self, item: Item, code: str, detail: str) -> None:
        self.losses.append((code, detail))
        self.end(item)

    def end(self, item: Item) -> None:
        self.loop.end(item, lambda: self.freed.append(item))


class Desk:
    def __init__(self, answer_seconds: float) -> None:
        self.engine, self.told, self.ledger = Played(), Told(), Ledger(INFO.pool_blocks)
        self.loop = self.told.loop = EngineLoop(
            self.engine, self.ledger, self.told, answer_seconds=answer_seconds, limit=lambda _: 20
        )
        self.requests = 0
        self.task: asyncio.Task[None]

    @property
    def say(self) -> Events:
        return self.engine.events

    def prefix(self, *, n: int = 1, here: bool = False, scores: int | None = None) -> Prefilling:
        self.requests += 1
        held = Held(None, 1, f"r#{self.requests}")
        request = msgspec.structs.replace(spec(PROMPT, n=n), prompt_logprobs=scores)
        work = held.prefilling = Prefilling.of(held, request, decode_here=here)
        work.push = cast("Any", None if here else object())
        self.loop.add_prefill(work)
        return work

    def landed(self, index: int = 0) -> Running:
        request = spec(PROMPT)
        sequence = sequences_of(request)[0]
        sequence.generated.append(7)
        holder = Holder("decode", f"r#0/{index}")
        running = Running(
            held=Held(None, 1, "r#0"),
            index=index,
            sequence=sequence,
            blocks=self.ledger.take(3, holder),
            holder=holder,
            max_tokens=20,
            deadline=0.0,
        )
        self.loop.add_running([running])
        return running

    def here(self, work: Prefilling) -> list[Running]:
        """What the requests make of a prefix that is decoded where it is."""
        started = [
            Running(
                held=work.held,
                index=one.index,
                sequence=sequence,
                blocks=[],
                holder=Holder("decode", f"{work.held.name}/{one.index}"),
                max_tokens=20,
                deadline=0.0,
            )
            for one, sequence in zip(work.spec.sequences, work.sequences, strict=True)
        ]
        self.loop.add_running(started)
        self.told.end(work)
        return started

    async def until(self, true: Callable[[], Any]) -> None:
        async with asyncio.timeout(3):
            while not true():
                await asyncio.sleep(0.001)

    async def heard(self) -> None:
        """The loop has heard all that was said."""
        inbox = cast("Any", self.say)
        await self.until(lambda: not inbox._events)
        await asyncio.sleep(0)


@asynccontextmanager
async def played(answer_seconds: float = 30.0) -> AsyncIterator[Desk]:
    desk = Desk(answer_seconds)
    desk.task = asyncio.ensure_future(desk.loop.run())
    await desk.until(lambda: hasattr(desk.engine, "events"))
    try:
        yield desk
    finally:
        desk.task.cancel()
        await asyncio.wait([desk.task])


async def given(desk: Desk, count: int = 1) -> list[str]:
    await desk.until(lambda: len(desk.engine.jobs) >= count)
    return list(desk.engine.jobs)


async def test_a_prefix_is_handed_over_as_it_is_exported() -> None:
    async with played() as desk:
        work = desk.prefix()
        (name,) = await given(desk)
        job = desk.engine.jobs[name]
        assert isinstance(job, PrefillJob)
        assert (job.tokens, list(job.blocks)) == (PROMPT, work.blocks)
        desk.say.ready(name, 0, 16)
        for layer in range(LAYERS):
            desk.say.ready(name, 16, 40, layer)
        desk.say.prefilled(name, Output((Sampled(5),)), 16)
        await desk.until(lambda: desk.told.outputs)
        assert sorted(desk.told.ready) == sorted(
            [(at, 0, 16) for at in range(LAYERS)] + [(at, 16, 40) for at in range(LAYERS)]
        )
        assert (work.done, work.reused, desk.loop.waiting) == (40, 16, 0)
        desk.told.end(work)  # as when the handoff is over
        assert not desk.told.freed
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [work])


@pytest.mark.parametrize(
    "exports",
    [
        [],
        [(0, 39, None)],
        [(0, 40, layer) for layer in range(LAYERS - 1)],
        [(0, 16, None), (17, 40, None)],
        [(16, 40, None)],
        [(0, 41, None)],
        [(0, 40, LAYERS)],
        [(0, 40, None), (0, 40, 0)],
        [(0, 0, None)],
    ],
)
async def test_a_prefix_that_is_exported_otherwise_than_whole_is_lost(exports: list[Any]) -> None:
    async with played() as desk:
        work = desk.prefix()
        (name,) = await given(desk)
        for start, end, layer in exports:
            desk.say.ready(name, start, end, layer)
        desk.say.prefilled(name, Output((Sampled(5),)))
        await desk.until(lambda: desk.told.losses)
        assert desk.told.losses[0][0] == "engine_failed"
        assert "export" in desk.told.losses[0][1]
        assert not desk.told.outputs
        await desk.until(lambda: desk.engine.aborted == [name])
        assert not desk.told.freed
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [work])


@pytest.mark.parametrize(
    ("output", "scores"),
    [(Output(), None), (Output((Sampled(1), Sampled(2))), None), (Output((Sampled(1),)), 0)],
)
async def test_a_result_of_the_wrong_size_is_lost(output: Output, scores: int | None) -> None:
    async with played() as desk:
        desk.prefix(scores=scores)
        (name,) = await given(desk)
        desk.say.ready(name, 0, 40)
        desk.say.prefilled(name, output)
        await desk.until(lambda: desk.told.losses)
        assert not desk.told.outputs


@pytest.mark.parametrize(
    ("error", "code"), [(BackendError("no"), "engine_failed"), (PoolExhausted("x"), "preempted")]
)
@pytest.mark.parametrize("kind", ["prefill", "decode", "in place"])
async def test_a_job_that_is_refused_is_lost_alone(error: Exception, code: str, kind: str) -> None:
    async with played() as desk:
        desk.engine.refusal = error
        item = desk.landed() if kind == "decode" else desk.prefix(here=kind == "in place", n=3)
        await desk.until(lambda: desk.told.losses)
        assert [it for it, _ in desk.told.losses] == [code]
        assert desk.told.freed == [item]
        desk.engine.refusal = None
        desk.prefix()
        await given(desk)


@pytest.mark.parametrize("kind", ["prefill", "decode", "in place"])
async def test_what_fails_is_free_when_it_has_ended(kind: str) -> None:
    async with played() as desk:
        item = desk.landed() if kind == "decode" else desk.prefix(here=kind == "in place")
        (name,) = await given(desk)
        desk.say.failed(name, RuntimeError("fell over"))
        desk.say.failed(name, RuntimeError("again"))
        await desk.until(lambda: desk.told.losses)
        assert desk.told.losses == [("engine_failed", "RuntimeError: fell over")]
        assert desk.told.freed == ([item] if kind == "in place" else [])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [item])
        assert not desk.engine.aborted


async def test_a_sequence_lets_the_arena_go_when_it_is_imported() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        assert desk.ledger.free == INFO.pool_blocks - 3
        desk.say.imported(name)
        await desk.until(lambda: desk.ledger.free == INFO.pool_blocks)
        desk.say.decoded([(name, Sampled(3)), (name, Sampled(4))])
        await desk.until(lambda: desk.told.tokens == [3, 4])
        desk.told.end(running)
        await desk.until(lambda: desk.engine.aborted == [name])
        desk.say.decoded([(name, Sampled(5))])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [running])
        assert desk.told.tokens == [3, 4]


async def test_a_cancelled_import_keeps_the_arena_until_it_has_ended() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        desk.told.end(running)
        await desk.until(lambda: desk.engine.aborted == [name])
        assert not desk.told.freed
        desk.say.ended(name)
        await desk.until(lambda: desk.told.freed == [running])


async def test_events_that_make_no_sense_change_nothing() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        for job in ("nobody", name):
            desk.say.ready(job, 0, 40)
            desk.say.prefilled(job, Output((Sampled(1),)))
        for _ in range(2):
            desk.say.imported(name)
            desk.say.imported("nobody")
        desk.say.failed("nobody", RuntimeError("x"))
        desk.say.decoded([("nobody", Sampled(1)), (name, Sampled(3))])
        await desk.until(lambda: desk.told.tokens == [3])
        desk.told.end(running)
        for _ in range(2):
            desk.say.ended(name)
            desk.say.ended("nobody")
        await desk.until(lambda: desk.told.freed == [running])
        await desk.heard()
        assert (desk.told.losses, desk.told.outputs, desk.task.done()) == ([], [], False)


@pytest.mark.parametrize("token", [Sampled(-1), Sampled(INFO.vocabulary), None])
async def test_what_is_no_token_loses_its_sequence(token: Any) -> None:
    async with played() as desk:
        desk.landed()
        (name,) = await given(desk)
        desk.say.decoded([(name, token)])
        await desk.until(lambda: desk.told.losses)
        await desk.until(lambda: desk.engine.aborted == [name])


async def test_a_sequence_that_the_engine_ends_too_early_is_lost_after_its_tokens() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        desk.say.decoded([(name, Sampled(3))])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.losses)
        assert (desk.told.tokens, desk.told.freed) == ([3], [running])
        assert "before its last token" in desk.told.losses[0][1]


async def test_a_paused_sequence_is_told_nothing_and_loses_nothing() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        running.paused = True
        for token in range(5):
            desk.say.decoded([(name, Sampled(token))])
        desk.say.ended(name)
        await desk.heard()
        assert desk.told.tokens == []
        running.paused = False
        desk.loop.resume()
        await desk.until(lambda: desk.told.losses)
        assert desk.told.tokens == [0, 1, 2, 3, 4]


async def test_a_sequence_that_stays_paused_is_computed_no_more() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        running.paused = True
        for token in range(PAUSED_TOKENS + 1):
            desk.say.decoded([(name, Sampled(token))])
        await desk.until(lambda: desk.engine.aborted == [name])
        desk.say.decoded([(name, Sampled(0))])
        desk.say.ended(name)
        await desk.heard()
        assert (desk.told.tokens, desk.told.losses, desk.loop.running) == ([], [], 1)
        running.paused = False
        desk.loop.resume()
        await desk.until(lambda: desk.told.losses)
        assert desk.told.tokens == list(range(PAUSED_TOKENS + 1))
        assert desk.told.losses[0][0] == "preempted"
        assert desk.told.freed == [running]


async def test_what_a_paused_sequence_said_before_it_failed_is_told() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        running.paused = True
        desk.say.decoded([(name, Sampled(1)), (name, Sampled(2))])
        desk.say.failed(name, RuntimeError("fell over"))
        await desk.heard()
        assert not desk.told.losses
        running.paused = False
        desk.loop.resume()
        await desk.until(lambda: desk.told.tokens == [1, 2])
        desk.say.ended(name)
        await desk.until(lambda: desk.told.losses)
        assert "fell over" in desk.told.losses[0][1]
        assert desk.told.freed == [running]


async def test_a_prefix_is_done_once() -> None:
    async with played() as desk:
        desk.prefix()
        (name,) = await given(desk)
        desk.say.ready(name, 0, 40)
        for _ in range(2):
            desk.say.prefilled(name, Output((Sampled(5),)))
        await desk.heard()
        assert len(desk.told.outputs) == 1


async def test_when_one_sequence_in_place_is_refused_no_other_is_asked_for() -> None:
    async with played() as desk:
        desk.engine.refusal = PoolExhausted("x")
        desk.engine.refusals = 1
        desk.prefix(n=3, here=True)
        await desk.until(lambda: desk.told.losses)
        assert (len(desk.told.losses), desk.engine.jobs) == (1, {})


async def test_a_sequence_in_place_that_ends_before_the_others_begin_is_free_at_once() -> None:
    async with played() as desk:
        desk.told.then = lambda it: setattr(desk, "started", desk.here(it))
        work = desk.prefix(n=2, here=True)
        one, two = await given(desk, 2)
        desk.say.decoded([(one, Sampled(1)), (one, Sampled(2))])
        desk.say.ended(one)
        await desk.heard()
        desk.say.decoded([(two, Sampled(3))])
        await desk.until(lambda: desk.told.losses)
        first, _ = cast("Any", desk).started
        assert (desk.told.tokens, desk.told.freed) == ([2], [work, first])


async def test_in_place_a_prefix_is_done_when_every_sequence_has_a_token() -> None:
    async with played() as desk:
        work = desk.prefix(n=2, here=True, scores=0)
        desk.told.then = lambda it: setattr(desk, "started", desk.here(it))
        one, two = await given(desk, 2)
        scores = tuple(Logprob(1, -1.0) for _ in PROMPT[1:])
        desk.say.prefilled(one, Output((), scores), 8)
        desk.say.decoded([(one, Sampled(3))])
        desk.say.decoded([(one, Sampled(4))])
        await desk.heard()
        assert not desk.told.outputs
        desk.say.decoded([(one, Sampled(5)), (two, Sampled(9))])
        await desk.until(lambda: desk.told.tokens == [4, 5])
        assert desk.told.outputs == [Output((Sampled(3), Sampled(9)))]
        assert (work.reused, len(work.logprobs)) == (8, 39)
        assert desk.told.freed == [work]
        jobs = cast("list[DecodeJob]", list(desk.engine.jobs.values()))
        assert [job.prompt_logprobs for job in jobs] == [0, None]
        desk.say.decoded([(two, Sampled(8))])
        await desk.until(lambda: desk.told.tokens == [4, 5, 8])
        desk.say.ended(one)
        await desk.until(lambda: len(desk.told.losses) == 1)


async def test_what_is_cancelled_in_place_ends_every_sequence() -> None:
    async with played() as desk:
        work = desk.prefix(n=3, here=True)
        names = await given(desk, 3)
        desk.say.decoded([(names[0], Sampled(3))])
        await desk.heard()
        desk.told.end(work)
        await desk.until(lambda: sorted(desk.engine.aborted) == sorted(names))
        assert desk.told.freed == [work]
        for name in names:
            desk.say.ended(name)
        await desk.heard()
        assert (desk.loop._open, desk.loop._given) == ({}, {})


async def test_a_prefix_waits_for_room_in_the_arena() -> None:
    async with played() as desk:
        holder = Holder("landing", "x")
        desk.ledger.take(INFO.pool_blocks - 2, holder)
        desk.prefix()
        second = desk.prefix()
        desk.told.end(second)
        assert desk.told.freed == [second]
        await asyncio.sleep(0)
        assert (desk.loop.waiting, desk.loop.waiting_tokens) == (1, 40)
        assert not desk.engine.jobs
        desk.ledger.release(holder)
        desk.loop.resume()
        assert len(await given(desk)) == 1


async def test_memory_of_what_has_ended_is_out_of_balance() -> None:
    async with played() as desk:
        running = desk.landed()
        (name,) = await given(desk)
        desk.engine.held = {name: 4}
        assert desk.loop.pins.held == ((name, 4),)
        assert not desk.loop.pins.wrong
        assert desk.loop.room.free == INFO.engine_blocks - 4
        desk.told.end(running)
        desk.say.ended(name)
        await desk.until(lambda: desk.loop.pins.wrong)


async def hung(desk: Desk, error: type[Exception]) -> str:
    async with asyncio.timeout(3):
        await asyncio.wait([desk.task])
    with pytest.raises(error) as raised:
        await desk.task
    return str(raised.value)


async def test_an_engine_that_does_not_end_what_was_aborted_hangs() -> None:
    async with played(answer_seconds=0.1) as desk:
        running, _ = desk.landed(), desk.landed(1)
        name, other = await given(desk, 2)
        desk.told.end(running)

        def go_on() -> None:
            desk.say.decoded([(other, Sampled(1))])
            asyncio.get_running_loop().call_later(0.02, go_on)

        go_on()
        assert name in await hung(desk, DeviceHangs)
        assert not desk.told.freed


async def test_an_engine_that_does_not_end_what_failed_hangs() -> None:
    async with played(answer_seconds=0.1) as desk:
        desk.landed()
        (name,) = await given(desk)
        desk.say.failed(name, RuntimeError("x"))
        assert name in await hung(desk, DeviceHangs)


async def test_an_engine_with_jobs_that_says_nothing_hangs() -> None:
    async with played(answer_seconds=0.1) as desk:
        await asyncio.sleep(0.15)
        assert not desk.task.done(), "it had nothing to say"
        desk.prefix()
        assert "1 jobs" in await hung(desk, DeviceHangs)


async def test_an_engine_that_says_that_it_died_has_died() -> None:
    async with played() as desk:
        desk.say.died("out of memory")
        assert await hung(desk, EngineDied) == "out of memory"


async def test_an_engine_whose_abort_raises_has_died() -> None:
    async with played() as desk:
        running = desk.landed()
        await given(desk)
        desk.engine.refusal = RuntimeError("no connection")
        desk.told.end(running)
        assert "no connection" in await hung(desk, EngineDied)
