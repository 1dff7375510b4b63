"""Locust users who chat with an OpenAI-compatible server and watch the answer arrive.

Rows of the report: `chat` is the whole answer, `TTFT` the time to its first token, `gap` the time
between two tokens of one stream. Failures come with their type: the status and code of an HTTP
error, an error inside the stream, a stream that was cut off, a timeout.
Lengths, model and seed are options; `locust -f loadtest/locustfile.py --help` lists them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import time
from contextlib import closing
from typing import Any

from locust import User, events, task
from locust.exception import StopUser

from loadtest.chat import FAILURES, Server, deltas
from loadtest.lengths import Lengths
from loadtest.sse import BadStream

WORDS = ("river", "stone", "bridge", "market", "quiet", "town", "rain", "harbour", "road")


def _lengths(text: str) -> str:
    try:
        Lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


@events.init_command_line_parser.add_listener
def _options(parser: argparse.ArgumentParser) -> None:
    add: Any = parser.add_argument  # of a subclass: `is_secret` is for the web page
    add(
        "--prompt-words",
        type=_lengths,
        default="lognormal:120:0.8",
        help="length of a prompt: fixed:N, uniform:LOW:HIGH, exponential:MEAN, lognormal:MEDIAN:S",
    )
    add(
        "--output-tokens",
        type=_lengths,
        default="lognormal:80:0.6",
        help="max_tokens of a request, drawn likewise",
    )
    add("--chat-model", default="", help="model to ask for; default: the first one")
    add(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY", ""),
        help="bearer token; default: $OPENAI_API_KEY",
        is_secret=True,
    )
    add("--seed", type=int, default=1, help="seed of lengths, words and pauses")
    add("--pause", type=float, default=1.0, help="mean seconds between two chats")
    add("--give-up", type=float, default=120.0, help="seconds without a byte")
    add(
        "--ignore-eos",
        action="store_true",
        help="ask for exactly the drawn number of tokens (not every server knows this field)",
    )


class Chatter(User):  # type: ignore[misc]
    """Asks, reads the answer as it is written, pauses, asks again."""

    host = "http://127.0.0.1:8000"
    numbers = itertools.count()

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.rng = random.Random(f"{options.seed}/{next(self.numbers)}")
        self.prompt_words = Lengths(options.prompt_words)
        self.output_tokens = Lengths(options.output_tokens)
        self.server = Server(self.host, options.api_key, options.give_up)
        try:
            self.model = options.chat_model or self.server.first_model()
        except (*FAILURES, ValueError, LookupError, TypeError) as error:
            self.report("models", 0.0, failure=error)
            raise StopUser from error

    def wait_time(self) -> float:
        mean: float = self.environment.parsed_options.pause
        return self.rng.expovariate(1 / mean) if mean > 0 else 0.0

    @task
    def chat(self) -> None:
        """One chat; its row appears when it is over, those of its tokens as they come."""
        began, length, failure = time.perf_counter(), 0, None
        try:
            length = self._stream(began)
        except FAILURES as error:
            failure = error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            failure = BadStream(f"not a chat completion chunk: {error!r}")
        self.report("chat", time.perf_counter() - began, length=length, failure=failure)

    def _stream(self, began: float) -> int:
        before, length = began, 0
        with closing(self.server.connect()) as connection:
            response = self.server.ask(connection, "POST", "/v1/chat/completions", self._body())
            for text in deltas(response):
                now = time.perf_counter()
                self.report("gap" if length else "TTFT", now - before, length=len(text))
                before, length = now, length + len(text)
        return length

    def _body(self) -> dict[str, Any]:
        words = self.rng.choices(WORDS, k=self.prompt_words.draw(self.rng))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": self.output_tokens.draw(self.rng),
            "stream": True,
        }
        if self.environment.parsed_options.ignore_eos:
            body["ignore_eos"] = True
        return body

    def report(
        self, name: str, seconds: float, *, length: int = 0, failure: BaseException | None = None
    ) -> None:
        """Add to one row of the report."""
        self.environment.events.request.fire(
            request_type={"chat": "POST", "models": "GET"}.get(name, "SSE"),
            name=name,
            response_time=seconds * 1000,
            response_length=length,
            exception=failure,
            context={},
        )
