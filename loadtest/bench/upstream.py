"""An engine's HTTP server for proxies to copy from: ready-made chunks on a set clock.

It stands behind nginx and the bare proxy, which only copy, so that they carry the same bytes at
the same times as a gateway that makes them itself. `step`: the tokens of all streams leave
together, as from a batched engine. `paced`: each stream has its own clock. A request that does
not stream is answered at once.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
from typing import Any, Literal

import msgspec
import uvloop

from loadtest.bench.wire import Head, length_of

Pace = Literal["step", "paced"]

PIECE = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"synthetic","choices":[{"index":0,'
    b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
START = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN_CHUNK = _chunk(PIECE)
LAST_CHUNK = (
    _chunk(PIECE.replace(b'"finish_reason":null', b'"finish_reason":"length"'))
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
ANSWER = (
    b'{"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion","created":1700000000,'
    b'"model":"synthetic","choices":[{"index":0,"message":{"role":"assistant","content":'
    b'" word word word word word word word word"},"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":32,"completion_tokens":8,"total_tokens":40}}'
)
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(ANSWER),
    ANSWER,
)


class Asked(msgspec.Struct):
    """What matters of a request's body."""

    stream: bool = False
    max_tokens: int = 16


class Clock:
    """Says when a stream's next token leaves. Drift-free: each tick is booked from the last."""

    def __init__(self, pace: Pace, interval: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._interval = interval
        self._random = random.Random(1)
        self._together: set[Connection] = set()
        if pace == "step":
            self._step(self._loop.time())
        self._own = pace == "paced"

    def start(self, stream: Connection) -> None:
        """Give `stream` its tokens from now on."""
        if self._own:
            self._tick(stream, self._loop.time() + self._random.random() * self._interval)
        else:
            self._together.add(stream)

    def _step(self, at: float) -> None:
        self._together = {stream for stream in self._together if stream.token()}
        self._loop.call_at(at + self._interval, self._step, at + self._interval)

    def _tick(self, stream: Connection, at: float) -> None:
        if stream.token():
            self._loop.call_at(at + self._interval, self._tick, stream, at + self._interval)


class Connection(asyncio.Protocol):
    """One proxy's connection: requests one after another."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._head = Head()
        self._body: bytes | None = None
        self._length = 0
        self._left = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._left = 0

    def data_received(self, data: bytes) -> None:
        if self._body is None:
            parts = self._head.feed(data)
            if parts is None:
                return
            self._length = length_of(parts[0]) or 0
            self._body = b""
            data = parts[1][1:]
        self._body += data
        if len(self._body) >= self._length:
            asked = msgspec.json.decode(self._body[: self._length], type=Asked)
            self._body = None
            self._answer(asked)

    def _answer(self, asked: Asked) -> None:
        if not asked.stream:
            self._transport.write(WHOLE)
            return
        self._transport.write(START)
        self._left = asked.max_tokens
        self._clock.start(self)

    def token(self) -> bool:
        """Send the next token; False when there is none after it."""
        if not self._left:
            return False
        self._left -= 1
        self._transport.write(TOKEN_CHUNK if self._left else LAST_CHUNK)
        return self._left > 0


async def serve(port: int, pace: Pace, interval: float) -> None:
    """Answer on loopback until the process is stopped."""
    connection = functools.partial(Connection, Clock(pace, interval))
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pace", choices=("step", "paced"), default="step")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between tokens")
    asked = parser.parse_args()
    uvloop.run(serve(asked.port, asked.pace, asked.interval))


if __name__ == "__main__":
    main()
