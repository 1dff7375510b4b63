"""The control connection of a worker: who may talk, and what becomes of garbage."""

import asyncio
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.api import Output, Row, Sampled, Sampling
from backends.emulation.synthetic import SyntheticBackend
from backends.host import HostConfig, WorkerHost
from backends.host.worker import MAX_STRANGERS
from backends.protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    Caller,
    Cancel,
    Challenge,
    Failed,
    Granted,
    Inspect,
    Ledger,
    Message,
    Prefill,
    Refused,
    RequestSpec,
    Reserve,
    SequenceSpec,
    ToGateway,
    Tokens,
    Welcome,
    frame,
)
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

SHAPE: dict[str, Any] = {"layers": 2, "kv_heads": 1, "head_dim": 8, "pool_tokens": 512}


class Peer:
    """The other end of a control connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, message: Message) -> None:
        self.writer.write(frame(message))

    async def hear(self, *kinds: type[Message]) -> Any:
        """The next message of one of these kinds."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
                body = await self.reader.readexactly(length)
                message = msgspec.msgpack.decode(body, type=ToGateway)
                if isinstance(message, kinds):
                    return message

    async def greet(self, secret: str = "") -> "Peer":
        caller = Caller("g", secret)
        self.send(caller.hello)
        self.send(caller.prove(await self.hear(Challenge)))
        self.welcome: Welcome = await self.hear(Welcome)
        caller.check(self.welcome)
        return self

    async def free(self) -> int:
        self.send(Inspect(ticket=1))
        ledger: Ledger = await self.hear(Ledger)
        assert ledger.balanced
        return ledger.free_blocks

    async def ended(self) -> bool:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.reader.read(65536):
                pass
        return True


class Site:
    def __init__(self, path: str, host: WorkerHost) -> None:
        self.path, self.host = path, host

    async def peer(self) -> Peer:
        return Peer(*await asyncio.open_unix_connection(self.path))


def spec(prompt: list[int], *, handle: int = 1, n: int = 1, **more: Any) -> RequestSpec:
    return RequestSpec(
        handle=handle,
        request="r",
        prompt=prompt,
        sequences=tuple(SequenceSpec(index=i, seed=i) for i in range(n)),
        sampling=more.pop("sampling", Sampling()),
        max_tokens=more.pop("max_tokens", 8),
        deadline_seconds=more.pop("deadline_seconds", LONG_SECONDS),
    )


async def site(backend: Any = None, **config: Any) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        path = str(Path(folder) / "w.sock")
        settings = {"id": "w", "role": "both", "listen": f"unix:{path}", **config}
        host = WorkerHost(HostConfig(**settings), backend or SyntheticBackend(**SHAPE))
        ready = asyncio.Event()
        running = asyncio.ensure_future(host.run(ready.set))
        await ready.wait()
        yield Site(path, host)
        running.cancel()
        await asyncio.wait([running])


@pytest.fixture
async def worker() -> AsyncIterator[Site]:
    async for it in site(secret="sesame", lease_seconds=2.0):
        yield it


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        frame(Cancel(handle=1))[:4] + msgspec.msgpack.encode({"type": "Cancel", "handle": "x"}),
        struct.pack(">I", 0),
    ],
)
async def test_garbage_ends_that_connection_and_no_other(worker: Site, garbage: bytes) -> None:
    good = await (await worker.peer()).greet("sesame")
    bad = await (await worker.peer()).greet("sesame")
    bad.writer.write(garbage)
    bad.writer.write_eof()
    assert await bad.ended()
    assert await good.free() == 32


async def test_strangers_make_way_for_each_other_and_for_whoever_proves_itself(
    worker: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.host.worker.HELLO_SECONDS", LONG_SECONDS)
    good = await (await worker.peer()).greet("sesame")
    first = await worker.peer()
    first.send(Caller("g", "sesame").hello)
    await first.hear(Challenge)
    others = [await worker.peer() for _ in range(MAX_STRANGERS)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await first.ended()
    assert await (await (await worker.peer()).greet("sesame")).free() == 32
    assert await good.free() == 32
    for other in others:
        other.writer.close()


async def test_a_landing_that_nobody_writes_to_expires_and_frees_its_blocks(worker: Site) -> None:
    peer = await (await worker.peer()).greet("sesame")
    peer.send(Reserve(spec=spec([1] * 40)))
    await peer.hear(Granted)
    assert await peer.free() == 32 - 4
    failed: Failed = await peer.hear(Failed)
    assert failed.code == "landing_expired"
    assert failed.retry
    assert await peer.free() == 32


async def test_a_lost_gateway_loses_all_that_it_held() -> None:
    """Long before leases lapse, and before the pool is used up."""
    slow = SyntheticBackend(**SHAPE, step_seconds=0.2)
    async for it in site(slow, secret="sesame", lease_seconds=LONG_SECONDS):
        peer = await (await it.peer()).greet("sesame")
        peer.send(Reserve(spec=spec([1] * 40, handle=1)))
        await peer.hear(Granted)
        peer.send(Prefill(spec=spec([1] * 40, handle=2, max_tokens=5000), decode_here=True))
        await peer.hear(Tokens)
        peer.writer.close()
        other = await (await it.peer()).greet("sesame")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await other.free() != 32:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (spec([]), "prompt"),
        (spec([1] * 9000), "context"),
        (spec([10**6]), "token ids"),
        (spec([1] * 600), "blocks"),
    ],
)
async def test_what_can_never_run_is_refused_and_takes_nothing(
    worker: Site, wrong: RequestSpec, reason: str
) -> None:
    peer = await (await worker.peer()).greet("sesame")
    peer.send(Reserve(spec=wrong))
    refused: Refused = await peer.hear(Refused)
    assert refused.kind == "invalid"
    assert reason in refused.detail
    assert await peer.free() == 32


async def test_a_full_pool_is_refused_for_now(worker: Site) -> None:
    peer = await (await worker.peer()).greet("sesame")
    peer.send(Reserve(spec=spec([1] * 300, handle=1)))
    await peer.hear(Granted)
    peer.send(Reserve(spec=spec([1] * 300, handle=2)))
    assert (await peer.hear(Refused)).kind == "full"


class Breaking(SyntheticBackend):
    """Raises in the third step, and says too little in the sixth."""

    count = 0

    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        self.count += 1
        if self.count == 3:
            raise RuntimeError("the device fell over")
        if self.count == 6:
            return []
        return super().step(batch, ready)


async def test_a_step_that_fails_loses_its_batch_and_no_more() -> None:
    async for it in site(Breaking(**SHAPE)):
        peer = await (await it.peer()).greet()
        for handle, cause in ((1, "fell over"), (2, "0 outputs")):
            peer.send(Prefill(spec=spec([1] * 40, handle=handle), decode_here=True))
            failed: Failed = await peer.hear(Failed)
            assert cause in failed.detail
            assert failed.retry
        assert await peer.free() == 32
        peer.send(Prefill(spec=spec([1] * 40, handle=3), decode_here=True))
        while (await peer.hear(Tokens)).rows[0].finish is None:
            pass
        assert await peer.free() == 32


class Ending(SyntheticBackend):
    def step(self, batch: list[Row], ready: Any) -> list[Output]:
        return [Output(tuple(Sampled(9) for _ in row.sequences)) for row in batch]


@pytest.mark.parametrize(
    ("sampling", "length", "finish"),
    [
        (Sampling(), 1, "stop"),
        (Sampling(ignore_eos=True), 8, "length"),
        (Sampling(min_tokens=3), 4, "stop"),
        (Sampling(stop_token_ids=(9,), ignore_eos=True), 1, "stop"),
    ],
)
async def test_sequences_end_where_their_parameters_say(
    sampling: Sampling, length: int, finish: str
) -> None:
    async for it in site(Ending(**SHAPE, end_tokens=(9,))):
        peer = await (await it.peer()).greet()
        peer.send(Prefill(spec=spec([1, 2], sampling=sampling), decode_here=True))
        from backends.protocol import FirstToken

        first: FirstToken = await peer.hear(FirstToken)
        seen, end = 1, first.first[0].finish
        while end is None:
            row = (await peer.hear(Tokens)).rows[0]
            seen, end = seen + 1, row.finish
        assert (seen, end) == (length, finish)
        assert await peer.free() == 32
