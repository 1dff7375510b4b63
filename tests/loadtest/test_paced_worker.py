"""The stand-in worker of the gateway benchmark, spoken to as a gateway would."""

import asyncio
from contextlib import asynccontextmanager

from backends.protocol import (
    Caller,
    Cancel,
    FirstToken,
    Link,
    Prefill,
    RequestSpec,
    Sampling,
    SequenceSpec,
    ToGateway,
    Tokens,
)
from loadtest.bench.worker import Paced
from tests.support.patience import PATIENCE_SECONDS


def request(handle, max_tokens):
    return Prefill(
        spec=RequestSpec(
            handle=handle,
            request=f"r{handle}",
            prompt=[1, 2, 3],
            sequences=(SequenceSpec(index=0, seed=1),),
            sampling=Sampling(),
            max_tokens=max_tokens,
            deadline_seconds=PATIENCE_SECONDS,
        ),
        decode_here=True,
    )


@asynccontextmanager
async def gateway_of(worker, path):
    heard = asyncio.Queue()
    loop = asyncio.get_running_loop()
    async with (
        await loop.create_unix_server(worker.connection, path),
        asyncio.timeout(PATIENCE_SECONDS),
    ):
        link = Link(ToGateway, lambda _, message: heard.put_nowait(message), lambda *_: None)
        await loop.create_unix_connection(lambda: link, path)
        caller = Caller("g", "")
        link.send(caller.hello)
        link.send(caller.prove(await heard.get()))
        caller.check(await heard.get())
        yield link, heard
        link.close()


async def of_type(heard, wanted):
    while not isinstance(message := await heard.get(), wanted):
        pass
    return message


async def test_a_request_gets_its_tokens_one_frame_each(tmp_path):
    async with gateway_of(Paced("paced", 0.001), str(tmp_path / "s")) as (link, heard):
        link.send(request(7, max_tokens=5))
        first = await of_type(heard, FirstToken)
        frames = [await of_type(heard, Tokens) for _ in range(4)]
    assert (first.handle, first.first[0].finish) == (7, None)
    assert [len(frame.rows) for frame in frames] == [1] * 4
    assert [frame.rows[0].position for frame in frames] == [1, 2, 3, 4]
    assert [frame.rows[0].finish for frame in frames] == [None, None, None, "length"]


async def test_a_single_token_ends_with_the_first(tmp_path):
    async with gateway_of(Paced("paced", 0.001), str(tmp_path / "s")) as (link, heard):
        link.send(request(1, max_tokens=1))
        assert (await of_type(heard, FirstToken)).first[0].finish == "length"


async def test_a_cancelled_request_stops(tmp_path):
    async with gateway_of(Paced("paced", 0.001), str(tmp_path / "s")) as (link, heard):
        link.send(request(1, max_tokens=1000))
        await of_type(heard, Tokens)
        link.send(Cancel(handle=1))
        link.send(request(2, max_tokens=20))
        seen = []
        while not (seen and seen[-1].finish):
            seen += (await of_type(heard, Tokens)).rows
    after = [row.handle for row in seen[[row.handle for row in seen].index(2) :]]
    assert set(after) == {2}
