"""A client that does not read its stream costs itself, and nobody else."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from carrier import MODEL, Served, serving, until

from tests.support.patience import PATIENCE_SECONDS

LONG = {
    "model": MODEL,
    "prompt": "go",
    "max_tokens": 8000,
    "stream": True,
    "ignore_eos": True,
}


@asynccontextmanager
async def lazy_client(served: Served, body: dict) -> AsyncIterator[socket.socket]:
    """A client with hardly any buffer that has asked and does not read."""
    host, port = served.url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(
            client, head.encode() + b"Content-Type: application/json\r\n\r\n" + data
        )
        yield client


async def read_all(client: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    got = bytearray()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while part := await loop.sock_recv(client, 65536):
            got += part
            if got.endswith(b"0\r\n\r\n"):
                break
    return bytes(got)


async def test_a_client_that_falls_behind_is_paused_and_loses_nothing(vocabulary):
    async with serving(vocabulary) as served:
        async with lazy_client(served, LONG) as client:
            await until(lambda: any(paused for _, _, paused in served.carrier.pauses))
            stream = await read_all(client)
        assert [paused for _, _, paused in served.carrier.pauses][:2] == [True, False]
        body = stream.split(b"\r\n\r\n", 1)[1]
        events = [line for line in body.split(b"\n") if line.startswith(b"data: ")]
        assert events[-1].strip() == b"data: [DONE]"
        chunks = [json.loads(event[6:]) for event in events[:-1]]
        said = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        tokens = served.carrier.tokens
        assert said == vocabulary.decode((tokens * 8000)[:8000])
        assert len(chunks) < 8000, "nothing was coalesced"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_client_that_never_reads_is_disconnected(vocabulary):
    async with serving(vocabulary, slow_client_seconds=0.2) as served, lazy_client(served, LONG):
        await until(lambda: bool(served.observed))
        assert served.carrier.running == 0
        assert served.observed[0]["status"] == 408


async def test_a_lazy_client_does_not_slow_others_down(vocabulary):
    async with serving(vocabulary) as served, lazy_client(served, LONG):
        await until(lambda: any(paused for _, _, paused in served.carrier.pauses))
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            aiohttp.ClientSession(served.url) as http,
            http.post("/v1/completions", json=LONG | {"max_tokens": 20}) as answer,
        ):
            body = await answer.read()
        assert b'"finish_reason":"length"' in body
        assert body.endswith(b"data: [DONE]\n\n")
        others = {job for job, _, paused in served.carrier.pauses if paused}
        assert others == {served.carrier.jobs[0].id}


async def test_a_healthy_client_gets_every_step_as_its_own_chunk(vocabulary):
    async with serving(vocabulary, said="one two three four five six") as served:
        served.carrier.before = lambda _: asyncio.sleep(0.002)
        async with (
            aiohttp.ClientSession(served.url) as http,
            http.post("/v1/completions", json=LONG | {"max_tokens": 60}) as answer,
        ):
            body = (await answer.read()).decode()
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["text"]]
    assert len(texts) == 60
