"""Every worker and every gateway is restarted under load, and no client notices."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest

from tests.storm.clients import Answer, Ask, Ordinary
from tests.storm.site import DECODES, Part, Site, site, synthetic
from tests.storm.truth import asks, learn, same
from tests.support.patience import PATIENCE_SECONDS

STREAMS = 24


class Crowd:
    """Clients that ask again and again, until told to stop."""

    def __init__(self, http: aiohttp.ClientSession, urls: tuple[str, ...]) -> None:
        self._http = http
        self._urls = urls
        self._questions = asks(3, 40)
        self.right: dict[Ask, Answer] = {}
        self.heard: list[tuple[Ask, Answer]] = []

    async def learn(self) -> None:
        """What the answers are while nothing happens."""
        self.right = await learn(Ordinary(self._http, self._urls), self._questions)

    async def press(self, stop: asyncio.Event) -> None:
        """Keep all streams going until `stop`."""
        questions = itertools.cycle(self._questions)

        async def one() -> None:
            client = Ordinary(self._http, self._urls)
            while not stop.is_set():
                question = next(questions)
                self.heard.append((question, await client.ask(question)))

        async with asyncio.TaskGroup() as streams:
            for _ in range(STREAMS):
                streams.create_task(one())

    async def more(self, count: int) -> None:
        """Wait until so many more have been answered."""
        until = len(self.heard) + count
        async with asyncio.timeout(4 * PATIENCE_SECONDS):
            while len(self.heard) < until:
                await asyncio.sleep(0.05)


async def restart(made: Site, part: Part, order: Callable[[], object]) -> None:
    order()
    assert await part.ended() == 0
    part.start()
    await made.ready()


async def drain(made: Site, worker: str) -> None:
    async with (
        aiohttp.ClientSession(made.urls[1]) as http,
        http.post(f"/admin/workers/{worker}/drain") as answer,
    ):
        assert answer.status == 202, await answer.text()


@pytest.fixture
async def made() -> AsyncIterator[Site]:
    members = synthetic(step_seconds=0.02)
    for one in members.values():
        one["drain_seconds"] = 0.3  # shorter than most streams: they must move
    async with site({"workers": members, "gateway": {"drain_seconds": 30}}) as it:
        yield it


@pytest.mark.slow
async def test_a_rolling_restart_of_everything_fails_no_request(made: Site) -> None:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http, asyncio.TaskGroup() as tasks:
        crowd, stop = Crowd(http, made.urls), asyncio.Event()
        await crowd.learn()
        tasks.create_task(crowd.press(stop))
        await crowd.more(STREAMS)
        for number, part in enumerate(made.of("prefill", "decode")):
            if number % 2:
                await drain(made, part.name)
                assert await part.ended() == 0
                part.start()
                await made.ready()
            else:
                await restart(made, part, lambda part=part: part.send(signal.SIGTERM))
            await crowd.more(STREAMS)
        for part in made.of("gateway"):
            await restart(made, part, lambda part=part: part.send(signal.SIGTERM))
            await crowd.more(STREAMS)
        stop.set()
    shown = await made.get(made.urls[0], "/admin/workers")
    layouts = {one["worker"]: one["layout"] for one in shown["workers"]}
    records = {record.id: record for record in await made.records()}
    assert {name: record.layout for name, record in records.items()} == layouts
    assert all(records[name].transports == ("shm", "tcp") for name in DECODES)
    failed = [answer for ask, answer in crowd.heard if not same(answer, crowd.right[ask])]
    assert not failed, failed[0]
    moved = [line for part in made.of("gateway") for line in part.events("sequence.preempted")]
    assert moved, "nothing had to move, so nothing was shown"
    await made.balanced(PATIENCE_SECONDS)
