"""Clients that read streams while something happens to the processes behind them."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.e2e.site import Site


class Stream:
    """One streamed completion: its text, how it ended, and what went wrong if it did."""

    def __init__(
        self, site: Site, prompt: str, max_tokens: int, *, n: int = 1, **more: Any
    ) -> None:
        self.site = site
        self.body = {
            "model": site.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "seed": 5,
            "n": n,
            **more,
        }
        self.tokens = 0
        self.text: dict[int, str] = {}
        self.finish: dict[int, str] = {}
        self.error: Any = None
        self.done = False
        self.started = threading.Event()

    def run(self) -> "Stream":
        request = self.site.post("/v1/completions", self.body)
        try:
            with urlopen(request, timeout=240) as answer:
                for line in answer:
                    self._line(line.decode().rstrip("\n"))
        except HTTPError as error:
            self.error = json.loads(error.read())["error"]
        except (OSError, HTTPException) as error:  # the gateway itself is gone
            self.error = {"code": "connection", "message": str(error)}
        self.started.set()
        return self

    def _line(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            if "error" in event:
                self.error = event["error"]
                return
            for choice in event["choices"]:
                index = choice["index"]
                self.text[index] = self.text.get(index, "") + choice["text"]
                self.tokens += 1
                if choice["finish_reason"]:
                    self.finish[index] = choice["finish_reason"]
            self.started.set()

    @property
    def whole(self) -> bool:
        return self.done and set(self.finish.values()) == {"length"} and self.error is None

    @property
    def typed(self) -> bool:
        return self.error is not None and bool(self.error["code"]) and bool(self.error["message"])


def run_all(streams: list[Stream], meanwhile: Any = None, *, under_way: int = 1) -> None:
    """Run all at once, and something else as soon as the first `under_way` have a token."""
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        if meanwhile is not None:
            for stream in streams[:under_way]:
                assert stream.started.wait(120)
            meanwhile()
        for one in running:
            one.result(300)
