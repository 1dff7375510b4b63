"""The loop around an engine that the tests play themselves, event by event."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from backends.api import DecodeJob, Events, Output, PrefillJob, Sampled
from backends.host.engine import EngineLoop
from backends.host.ledger import Holder, Ledger
from backends.host.loop import Item
from backends.host.work import Held, Prefilling, Running, sequences_of
from tests.engine.desk import engine
from tests.host.test_control import spec
from tests.support.patience import PATIENCE_SECONDS

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
        async with asyncio.timeout(PATIENCE_SECONDS):
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
