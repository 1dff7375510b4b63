"""The load: many streams or many short requests at once, counted as cheaply as possible.

A measurement is a window in which the load is steady: it begins when every stream has had some
tokens and ends before the first one runs dry. What the watched processes used is read at the
two moments at which the counts are. Afterwards every stream is read to its end, and must have
given all its tokens, each in an event of its own: a server that tells the usage may have fewer
events with text, because a token that is half a character has no text yet.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from loadtest.bench.process import cpu_seconds, resident_bytes
from loadtest.bench.wire import DONE, TOKEN, BadResponse, Head, Occurrences, Reply, status_of

CONNECT_BATCH = 32
WARM_TOKENS = 5
POLL_SECONDS = 0.05
SHORT_WARM_SECONDS = 2.0
TOLD_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
LEAST_EVENTS_PER_TOKEN = 0.95


class LoadFailed(Exception):
    """The load could not be brought to bear, or the answers were not what was asked for."""


class Window(msgspec.Struct, kw_only=True):
    """What one measurement gave. CPU is in seconds, by name of the watched process."""

    seconds: float
    count: int
    cpu: dict[str, float]
    rss: dict[str, int]
    own_cpu: float
    failed: int = 0
    events_per_token: float | None = None
    tokens_per_read: float | None = None

    @property
    def rate(self) -> float:
        """Tokens, or requests, per second."""
        return self.count / self.seconds

    def microseconds(self, name: str) -> float:
        """CPU time of one process per token, or per request."""
        return self.cpu[name] / self.count * 1e6


class _Gauge:
    """Reads CPU time of this process and of the watched ones, from one moment to another."""

    def __init__(self, watched: Mapping[str, Sequence[int]]) -> None:
        self._watched = watched
        self._at = time.monotonic()
        self._cpu = self._read()
        self._own = time.process_time()

    def _read(self) -> dict[str, float]:
        return {name: sum(map(cpu_seconds, pids)) for name, pids in self._watched.items()}

    def window(self, count: int, failed: int = 0) -> Window:
        now = self._read()
        return Window(
            seconds=time.monotonic() - self._at,
            count=count,
            cpu={name: now[name] - self._cpu[name] for name in now},
            rss={name: sum(map(resident_bytes, pids)) for name, pids in self._watched.items()},
            own_cpu=time.process_time() - self._own,
            failed=failed,
        )


class Stream(asyncio.Protocol):
    """One streamed answer on a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._head: Head | None = Head()
        self._tokens = Occurrences(TOKEN)
        self._last = b""
        self._done = Occurrences(DONE)
        self._transport: Any = None
        self.reads = 0
        self.problem = ""
        self.ended = asyncio.get_running_loop().create_future()

    @property
    def tokens(self) -> int:
        return self._tokens.count

    @property
    def generated(self) -> int:
        """How many tokens there were: as the server told, else as many as there were events."""
        told = TOLD_TOKENS.search(self._last)
        return int(told[1]) if told else self.tokens

    @property
    def complete(self) -> bool:
        return self._done.count == 1 and not self.problem

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            parts = self._head.feed(data)
            if parts is None:
                return
            self._head = None
            if status_of(parts[0]) != 200:
                self.problem = (parts[0] + b"\r" + parts[1])[:400].decode(errors="replace")
                self._transport.close()
                return
            data = parts[1]
        before = self._tokens.count
        self._tokens.feed(data)
        if self._tokens.count != before:
            self.reads += 1
        self._done.feed(data)
        if not self._done.count:
            self._last = data
        elif not self.ended.done():
            self._last += data
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.problem = self.problem or f"closed before [DONE]: {exc!r}"
            self.ended.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def _connect(streams: Sequence[Stream], port: int) -> None:
    """Open the connections a few at a time, so that no listening queue overflows."""
    loop = asyncio.get_running_loop()
    for start in range(0, len(streams), CONNECT_BATCH):
        try:
            async with asyncio.TaskGroup() as tasks:
                for stream in streams[start : start + CONNECT_BATCH]:
                    factory = functools.partial(_itself, stream)
                    tasks.create_task(loop.create_connection(factory, "127.0.0.1", port))
        except* OSError as group:
            raise LoadFailed(f"a stream could not connect: {group.exceptions[0]}") from group


def _itself(stream: Stream) -> Stream:
    return stream


def _check_all_running(streams: Sequence[Stream], when: str) -> None:
    ended = [stream for stream in streams if stream.ended.done()]
    if ended:
        raise LoadFailed(
            f"{len(ended)} of {len(streams)} streams ended {when}: "
            f"{ended[0].problem or 'its answer was complete, so the streams are too short'}"
        )


async def hold_streams(
    port: int,
    requests: Sequence[bytes],
    *,
    expected_tokens: int,
    warm_seconds: float,
    window_seconds: float,
    watched: Mapping[str, Sequence[int]],
    deadline_seconds: float,
) -> Window:
    """Hold one stream per request, measure while all of them run, then check every one.

    Raises:
        LoadFailed: a stream failed, ended inside the window, or gave more or fewer tokens.
        TimeoutError: it took longer than `deadline_seconds` altogether.
    """
    streams = [Stream(request) for request in requests]
    try:
        async with asyncio.timeout(deadline_seconds):
            await _connect(streams, port)
            while min(stream.tokens for stream in streams) < WARM_TOKENS:
                _check_all_running(streams, "before the window")
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(warm_seconds)
            tokens, reads = _totals(streams)
            gauge = _Gauge(watched)
            await asyncio.sleep(window_seconds)
            now_tokens, now_reads = _totals(streams)
            window = gauge.window(now_tokens - tokens)
            window.tokens_per_read = (now_tokens - tokens) / max(1, now_reads - reads)
            _check_all_running(streams, "inside the window")
            await asyncio.wait([stream.ended for stream in streams])
    finally:
        for stream in streams:
            stream.close()
    _check_each(streams, expected_tokens)
    window.events_per_token = sum(s.tokens for s in streams) / (len(streams) * expected_tokens)
    return window


def _totals(streams: Sequence[Stream]) -> tuple[int, int]:
    return sum(s.tokens for s in streams), sum(s.reads for s in streams)


def _check_each(streams: Sequence[Stream], expected_tokens: int) -> None:
    for stream in streams:
        if not stream.complete:
            raise LoadFailed(stream.problem or "a stream ended without [DONE]")
        if stream.generated != expected_tokens:
            raise LoadFailed(f"a stream had {stream.generated} tokens, not {expected_tokens}")
        if not LEAST_EVENTS_PER_TOKEN <= stream.tokens / expected_tokens <= 1:
            raise LoadFailed(f"{stream.tokens} events with text for {expected_tokens} tokens")


class _Short(asyncio.Protocol):
    """Requests one after another on one connection, each sent when the last was answered."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self._requests = requests
        self._reply = Reply()
        self._transport: Any = None
        self.answered = 0
        self.problem = ""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._requests[0])

    def data_received(self, data: bytes) -> None:
        try:
            complete = self._reply.feed(data)
        except BadResponse as error:
            self.problem = str(error)
            self._transport.close()
            return
        if complete:
            self.answered += 1
            self._reply = Reply()
            self._transport.write(self._requests[self.answered % len(self._requests)])

    def connection_lost(self, exc: Exception | None) -> None:
        self.problem = self.problem or f"the server closed the connection: {exc!r}"

    def close(self) -> None:
        self._transport.close()


async def short_requests(
    port: int,
    requests: Sequence[bytes],
    *,
    connections: int,
    window_seconds: float,
    watched: Mapping[str, Sequence[int]],
    warm_seconds: float = SHORT_WARM_SECONDS,
) -> Window:
    """Send requests back to back on so many connections, and count the answers.

    Raises:
        LoadFailed: an answer was no 200, or a connection was closed.
        OSError: the server cannot be reached.
    """
    loop = asyncio.get_running_loop()
    senders: list[_Short] = []
    try:
        for i in range(connections):
            turned = [*requests[i % len(requests) :], *requests[: i % len(requests)]]
            _, sender = await loop.create_connection(
                functools.partial(_Short, turned), "127.0.0.1", port
            )
            senders.append(sender)
        await asyncio.sleep(warm_seconds)
        before = sum(sender.answered for sender in senders)
        gauge = _Gauge(watched)
        await asyncio.sleep(window_seconds)
        window = gauge.window(sum(sender.answered for sender in senders) - before)
        problem = next((sender.problem for sender in senders if sender.problem), "")
    finally:
        for sender in senders:
            sender.close()
    if problem or not window.count:
        raise LoadFailed(problem or "no request was answered inside the window")
    return window
