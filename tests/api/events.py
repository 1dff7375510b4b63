"""Read a stream as its bytes are, without a client that tidies them up."""

import json
from typing import Any

import aiohttp


async def events(http: aiohttp.ClientSession, path: str, **body: Any) -> list[Any]:
    """The data of every event; the last is `[DONE]`, or an error."""
    async with http.post(path, json=body | {"stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        text = await answer.text()
    assert text.endswith("\n\n")
    return [
        event if event == "[DONE]" else json.loads(event)
        for line in text.split("\n\n")
        if (event := line.removeprefix("data: ")) and not line.startswith(":")
    ]


def said(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice, put together."""
    parts = []
    for chunk in chunks:
        if chunk == "[DONE]":
            continue
        for choice in chunk["choices"]:
            if choice["index"] == index:
                delta = choice.get("delta", {})
                parts.append(choice.get("text") or delta.get("content") or "")
    return "".join(parts)


def finishes(chunks: list[Any]) -> list[tuple[int, str]]:
    """Which choices ended how, in the order in which they did."""
    return [
        (choice["index"], choice["finish_reason"])
        for chunk in chunks
        if chunk != "[DONE]"
        for choice in chunk["choices"]
        if choice["finish_reason"]
    ]
