"""A client that comes back: one streamed answer, whatever happens to gateways on the way.

    python -m loadtest.resuming --url http://127.0.0.1:8000 "Tell me a story."

`stream` is all there is to copy: it sends an `Idempotency-Key`, remembers the `id` of the last
event, and asks the next gateway for the rest when a connection breaks, is refused or falls silent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

from loadtest.chat import ERROR_BYTES, READ_BYTES, RequestRefused, StreamFailed
from loadtest.sse import BadStream, Events

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
FINAL_CODES = frozenset({"taken_over", "deadline_exceeded", "continuation_lost"})


class GaveUp(Exception):
    """No gateway had anything new for too long; says what the last one did."""


class _Broken(Exception):
    """The connection is of no more use; after `seconds` another one may be."""

    def __init__(self, cause: str, seconds: float = 0.0) -> None:
        super().__init__(cause)
        self.seconds = seconds


@dataclass
class Resuming:
    """How to reach some gateways, and how long to hope.

    Without a byte for `silence_seconds` a connection is given up; without a new event for
    `patience_seconds` the answer is. `reconnects` counts how often it was asked for the rest.
    """

    urls: Sequence[str]
    api_key: str = ""
    silence_seconds: float = 15.0
    patience_seconds: float = 60.0
    reconnects: int = field(default=0, init=False)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of one answer, each once and in order, without `[DONE]`.

        Raises:
            RequestRefused: the gateway will not answer, now or later.
            StreamFailed: it said so inside the stream.
            GaveUp: `patience_seconds` are over.
        """
        request = json.dumps({**body, "stream": True})
        key, last, pause = secrets.token_hex(16), "", FIRST_PAUSE_SECONDS
        hope = time.monotonic() + self.patience_seconds
        for url in cycle(self.urls):
            try:
                for event, chunk in self._connection(url, path, request, key, last):
                    last = event
                    yield chunk
                    hope, pause = time.monotonic() + self.patience_seconds, FIRST_PAUSE_SECONDS
            except _Broken as broken:
                wait = max(broken.seconds, pause * random.uniform(0.5, 1.5))
                if time.monotonic() + wait > hope:
                    raise GaveUp(f"{url}: {broken}") from broken
            else:
                return
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self.reconnects += 1

    def _connection(
        self, url: str, path: str, request: str, key: str, last: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """What one connection gives after the event `last`: ids and chunks."""
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        if last:
            headers["Last-Event-ID"] = last
        connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=self.silence_seconds)
        with closing(connection):
            try:
                connection.request("POST", parts.path.rstrip("/") + path, request, headers)
                response = connection.getresponse()
                if response.status != 200:
                    _refuse(response)
                yield from _chunks(response)
            except (OSError, HTTPException, BadStream) as error:
                raise _Broken(f"{type(error).__name__}: {error}") from error


def _refuse(response: HTTPResponse) -> None:
    said = f"{response.status} {response.read(ERROR_BYTES).decode(errors='replace')}"
    if response.status not in TRY_AGAIN or response.getheader("x-should-retry") == "false":
        raise RequestRefused(said)
    try:
        seconds = float(response.getheader("Retry-After", ""))
    except ValueError:
        seconds = 0.0
    raise _Broken(said, min(max(0.0, seconds), LONGEST_PAUSE_SECONDS))


def _chunks(response: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    events = Events()
    while piece := response.read1(READ_BYTES):
        for data in events.feed(piece):
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                code = chunk["error"].get("code")
                if code in FINAL_CODES:
                    raise StreamFailed(f"{code}: {chunk['error'].get('message')}")
                raise _Broken(f"{code}: {chunk['error'].get('message')}")
            yield events.last_id, chunk
    raise _Broken("the stream ended without [DONE]")


def main() -> None:
    """Stream one chat to the terminal."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.resuming", description=__doc__)
    parser.add_argument("prompt", help="what to say")
    parser.add_argument("--url", action="append", help="of a gateway; several may be given")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""))
    parser.add_argument("--max-tokens", type=int, default=200)
    options = parser.parse_args()
    client = Resuming(options.url or ["http://127.0.0.1:8000"], options.api_key)
    body = {
        "messages": [{"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
    }
    for chunk in client.stream("/v1/chat/completions", body):
        for choice in chunk["choices"]:
            print(choice["delta"].get("content", ""), end="", flush=True)
    print()
    if client.reconnects:
        print(f"({client.reconnects} reconnects)", file=sys.stderr)


if __name__ == "__main__":
    main()
