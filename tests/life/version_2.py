"""A gateway and a worker as they were with version 2 of the protocol, kept as a neighbour.

They are written down in plain data and share no code with what is tested: what travels here must
go on being understood for as long as version 2 is spoken. Do not adapt them to newer versions.
"""

import asyncio
import hmac
import secrets
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from tests.support.patience import PATIENCE_SECONDS

VERSION = 2
LAYOUT: dict[str, Any] = {
    "model": "synthetic/49152",
    "weights": "synthetic",
    "layers": 3,
    "kv_heads": 2,
    "head_dim": 16,
    "dtype": "float16",
    "block_tokens": 16,
    "rope": "half",
    "axes": "block layer kv head token dim",
}
INFO: dict[str, Any] = {
    "layout": LAYOUT,
    "pool_blocks": 4096,
    "vocabulary": 49152,
    "context_tokens": 8192,
    "end_tokens": [],
    "rng": "positional",
    "continuation": "exact",
    "sampling": ["temperature", "top_p", "top_k", "logprobs", "min_tokens"],
    "max_batch": 1024,
    "emulated": True,
}
SPEC: dict[str, Any] = {
    "handle": 1,
    "request": "r",
    "prompt": [1, 2, 3],
    "sequences": [{"index": 0, "seed": 7}],
    "sampling": {},
    "max_tokens": 5,
    "deadline_seconds": 10.0,
}
LOAD: dict[str, Any] = {
    "type": "Load",
    "free_blocks": 4096,
    "pool_blocks": 4096,
    "running": 0,
    "waiting": 0,
    "waiting_tokens": 0,
}


class End:
    """One end of a connection that says and hears plain data."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard: list[dict[str, Any]] = []

    def say(self, **message: Any) -> None:
        body = msgspec.msgpack.encode(message)
        self._writer.write(struct.pack(">I", len(body)) + body)

    async def hear(self, *kinds: str) -> dict[str, Any]:
        """The next message of one of these kinds, or of any."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                (length,) = struct.unpack(">I", await self._reader.readexactly(4))
                message = msgspec.msgpack.decode(await self._reader.readexactly(length))
                self.heard.append(message)
                if message["type"] in kinds or not kinds:
                    return message

    def close(self) -> None:
        self._writer.close()


def mac(secret: str, *said: Any) -> bytes:
    words = msgspec.msgpack.encode(("baton control", *said))
    return hmac.digest(secret.encode(), words, "sha256")


async def greet(end: End, secret: str) -> dict[str, Any]:
    """A gateway's greeting; the worker's welcome."""
    nonce = secrets.token_bytes(32)
    end.say(type="Hello", version=VERSION, lowest=VERSION, gateway="old", nonce=nonce)
    challenge = (await end.hear("Challenge", "Rejected"))["nonce"]
    offer = (VERSION, VERSION, "old", nonce, challenge)
    end.say(type="Proof", mac=mac(secret, "gateway", *offer))
    welcome = await end.hear("Welcome", "Rejected")
    identity = [welcome[name] for name in ("version", "worker", "incarnation", "role")]
    assert welcome["mac"] == mac(secret, "worker", *offer, *identity)
    return welcome


async def welcome(end: End, name: str, secret: str) -> None:
    """A worker's part in a greeting."""
    hello = await end.hear("Hello")
    assert hello["lowest"] <= VERSION <= hello["version"]
    challenge = secrets.token_bytes(32)
    end.say(type="Challenge", nonce=challenge)
    offer = (hello["lowest"], hello["version"], hello["gateway"], hello["nonce"], challenge)
    assert (await end.hear("Proof"))["mac"] == mac(secret, "gateway", *offer)
    identity = {"version": VERSION, "worker": name, "incarnation": 1, "role": "both"}
    end.say(
        type="Welcome",
        **identity,
        info=INFO,
        endpoints=[],
        mac=mac(secret, "worker", *offer, *identity.values()),
    )


class Worker:
    """Does both, and says the tokens 100, 101, ... to whoever asks."""

    def __init__(self, name: str, secret: str) -> None:
        self._name, self._secret = name, secret
        self.heard: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = End(reader, writer)
        self.heard = end.heard
        try:
            await welcome(end, self._name, self._secret)
            end.say(**LOAD)
            while True:
                self._answer(end, await end.hear())
        except (asyncio.IncompleteReadError, TimeoutError):
            writer.close()

    def _answer(self, end: End, message: dict[str, Any]) -> None:
        match message["type"]:
            case "Prefill":
                self._prefill(end, message)
            case "Inspect":
                free = {"pool_blocks": 4096, "free_blocks": 4096, "holders": [], "balanced": True}
                end.say(type="Ledger", ticket=message["ticket"], worker=self._name, **free)
            case "Cancel" | "Flow" | "Meet":
                pass
            case unknown:  # as the real one did
                raise AssertionError(f"version 2 knows no {unknown}")

    def _prefill(self, end: End, message: dict[str, Any]) -> None:
        spec = message["spec"]
        handle, indexes = spec["handle"], [one["index"] for one in spec["sequences"]]
        first = [[index, 100] for index in indexes]
        end.say(type="FirstToken", handle=handle, first=first, wait=0.0, prefill=0.0)
        for at in range(1, spec["max_tokens"]):
            finish = "length" if at == spec["max_tokens"] - 1 else None
            rows = [[handle, index, at, 100 + at, finish] for index in indexes]
            end.say(type="Tokens", step=at, rows=rows)


@asynccontextmanager
async def serving(worker: Worker, path: str) -> AsyncIterator[None]:
    server = await asyncio.start_unix_server(worker.serve, path)
    try:
        yield
    finally:
        server.close()
