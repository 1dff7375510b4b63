"""A streamed chat as a plain client sees it: a blocking connection, read as the bytes arrive.

It knows OpenAI's protocol and no load-test tool; under gevent it is as concurrent as the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from loadtest.sse import BadStream, Events

READ_BYTES = 65536
ERROR_BYTES = 4096


class RequestRefused(Exception):
    """The server answered with an HTTP error."""


class StreamFailed(Exception):
    """The server reported an error inside the stream."""


class StreamCut(Exception):
    """The stream ended without a finish reason or without its end mark."""


FAILURES = (RequestRefused, StreamFailed, StreamCut, BadStream, HTTPException, OSError)


class Server:
    """One base URL, asked over a new connection each time, as separate clients would."""

    def __init__(self, url: str, key: str, seconds: float) -> None:
        parts = urlsplit(url)
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port
        self._base = parts.path.rstrip("/")
        self._seconds = seconds
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def connect(self) -> HTTPConnection:
        """A connection, to be closed by whoever asked for it."""
        return self._kind(self._host, self._port, timeout=self._seconds)

    def ask(
        self, connection: HTTPConnection, method: str, path: str, body: Any = None
    ) -> HTTPResponse:
        """Send a request; the response, its body still to be read.

        Raises:
            RequestRefused: the status is not 200.
        """
        encoded = None if body is None else json.dumps(body)
        connection.request(method, self._base + path, encoded, self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RequestRefused(f"{response.status} {_code(response.read(ERROR_BYTES))}")
        return response

    def first_model(self) -> str:
        """The first model that the server lists."""
        with closing(self.connect()) as connection:
            answer = json.loads(self.ask(connection, "GET", "/v1/models").read())
            return str(answer["data"][0]["id"])


def _code(body: bytes) -> str:
    """The code of an OpenAI-shaped error: few values, so that failures group by it."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:80].decode(errors="replace")


def deltas(response: HTTPResponse) -> Iterator[str]:
    """The pieces of text of a streamed chat, each as soon as it is here.

    Raises:
        StreamFailed: the server sent an error.
        StreamCut: the stream ended early.
    """
    parser, finished = Events(), False
    while piece := response.read1(READ_BYTES):
        for data in parser.feed(piece):
            if data == "[DONE]":
                if not finished:
                    raise StreamCut("[DONE] without a finish_reason")
                return
            event = json.loads(data)
            if "error" in event:
                raise StreamFailed(_code(data.encode()))
            for choice in event["choices"]:
                finished = finished or choice["finish_reason"] is not None
                text = choice["delta"].get("content")
                if text:
                    yield text
    raise StreamCut("the stream ended without [DONE]")
