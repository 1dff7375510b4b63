"""The gateway's end of control connections, against workers that misbehave."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from backends.emulation.synthetic import SyntheticBackend
from backends.protocol import LENGTH, VERSION, Door, Load, Message, ToWorker, Welcome, frame
from gateway.admission import WorkerRecord
from gateway.life.fleet import Fleet
from gateway.metrics import Metrics
from gateway.server import workers
from tests.life.cluster import SHAPE
from tests.support.patience import PATIENCE_SECONDS

INFO = SyntheticBackend(**SHAPE).info
LOAD = Load(free_blocks=1, pool_blocks=2, running=0, waiting=0, waiting_tokens=0, draining=True)


def welcome(worker: str = "w") -> Welcome:
    return Welcome(version=VERSION, worker=worker, incarnation=1, role="both", info=INFO)


def record(address: str) -> WorkerRecord:
    return WorkerRecord(
        id="w",
        incarnation=1,
        role="both",
        model="m",
        address=address,
        prefill_tokens=1,
        decode_tokens=1,
    )


@asynccontextmanager
async def impostor(said: Welcome, *more: Message, secret: str = "") -> AsyncIterator[str]:
    """A listener that greets back so, and then says nothing."""
    writers: list[asyncio.StreamWriter] = []

    async def hear(reader: asyncio.StreamReader) -> Any:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return msgspec.msgpack.decode(await reader.readexactly(length), type=ToWorker)

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        door = Door(await hear(reader), secret)
        writer.write(frame(door.challenge))
        await hear(reader)
        writer.write(b"".join(map(frame, (door.seal(said), *more))))

    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        path = str(Path(folder) / "w.sock")
        server = await asyncio.start_unix_server(greet, path)
        yield f"unix:{path}"
        server.close()
        for writer in writers:
            writer.close()


@asynccontextmanager
async def fleet(address: str, **options: Any) -> AsyncIterator[Fleet]:
    made = Fleet("g", "", **options)
    made.update({"w": record(address)})
    running = asyncio.ensure_future(made.run())
    try:
        yield made
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.005)


async def test_what_comes_with_the_greeting_is_heard() -> None:
    async with impostor(welcome(), LOAD) as address, fleet(address) as made:
        await until(lambda: made.workers)
        assert made.snapshot().workers[0].draining


async def test_a_worker_that_falls_silent_is_lost() -> None:
    async with (
        impostor(welcome()) as address,
        fleet(address, silence_seconds=0.2) as made,
    ):
        await until(lambda: made.workers)
        await until(lambda: not made.workers)


async def refused(said: Welcome, **options: Any) -> str:
    """Why whoever greets so is not taken."""
    with structlog.testing.capture_logs() as logs:
        async with impostor(said, **options) as address, fleet(address) as made:
            await until(lambda: made.unreachable)
            assert made.workers == ()
            (shown,) = workers(made)["unreachable"]
            assert (shown["worker"], shown["address"]) == ("w", address)
            made.update({})
            assert made.unreachable == ()
    (logged,) = [it["cause"] for it in logs if it["event"] == "worker.unreachable"]
    assert logged == shown["cause"]
    return logged


async def test_another_worker_behind_a_stale_address_is_not_taken_for_this_one() -> None:
    assert await refused(welcome("other")) == "w is not taken: other answers at its address"


async def test_whoever_does_not_know_the_secret_is_not_taken() -> None:
    assert await refused(welcome(), secret="guess") == "w is not taken: it does not know our secret"


@pytest.mark.parametrize(
    "address", ["tcp:127.0.0.1:99999", "udp:x", "unix:" + "x" * 200, "unix:\0", "tcp:\udcff:1"]
)
async def test_an_address_that_cannot_be_costs_no_more_than_that_worker(address: str) -> None:
    async with fleet(address) as made:
        await asyncio.sleep(0.05)
        assert made.workers == ()


@pytest.mark.parametrize(
    ("emulates", "shown"), [("", "formula"), ("an H200, llama", "an H200, llama")]
)
async def test_a_worker_whose_timing_is_made_up_shows_as_such(emulates: str, shown: str) -> None:
    info = msgspec.structs.replace(INFO, emulates=emulates)
    said = msgspec.structs.replace(welcome(), info=info)
    metrics = Metrics()
    with structlog.testing.capture_logs() as logs:
        async with impostor(said) as address, fleet(address) as made:
            await until(lambda: made.workers)
            metrics.watch(lambda: made.workers, {})
            (worker,) = workers(made)["workers"]
            labels = {"worker": "w", "accelerator": shown}
            assert metrics.registry.get_sample_value("baton_worker_emulated", labels) == 1
    assert worker["emulated"] == shown
    (logged,) = [it for it in logs if it["event"] == "worker.connected"]
    assert logged["emulated"] == shown
