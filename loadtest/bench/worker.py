"""A worker that only sends tokens, each stream on a clock of its own: load from the other end.

It speaks the gateway's control protocol and registers as any worker does, in role `both`, but has
no engine and knows one sequence per request. The first token of a request leaves at once, the
others one per interval from a random moment on, each in a frame by itself. That is the hardest
case for a gateway: nothing arrives together that could be handled together.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import time

import uvloop

from backends.protocol import (
    VERSION,
    BackendInfo,
    Cancel,
    First,
    FirstToken,
    Hello,
    Inspect,
    Ledger,
    Link,
    Load,
    Message,
    Prefill,
    RequestSpec,
    Sampling,
    Token,
    Tokens,
    ToWorker,
    Welcome,
)
from gateway.admission import Registration, WorkerRecord, open_redis
from gateway.config import RedisSection
from transfer.layout import KVLayout

POOL_BLOCKS = 1 << 16
BLOCK_TOKENS = 16
VOCABULARY = 49152
WORDS = range(820, 1180)  # the bundled model's vocabulary has whole pieces of text there
LOAD_SECONDS = 1.0

INFO = BackendInfo(
    layout=KVLayout(
        model=f"paced/{VOCABULARY}",
        weights="none",
        layers=1,
        kv_heads=1,
        head_dim=8,
        dtype="float16",
        block_tokens=BLOCK_TOKENS,
        rope="half",
    ),
    pool_blocks=POOL_BLOCKS,
    vocabulary=VOCABULARY,
    context_tokens=8192,
    end_tokens=(),
    rng="positional",
    continuation="exact",
    sampling=frozenset(Sampling.__struct_fields__),
    max_batch=4096,
    emulated=True,
)


class Paced:
    """The worker: gateways' connections, and the streams that run on each."""

    def __init__(self, name: str, interval: float) -> None:
        self.incarnation = time.time_ns()
        self._name = name
        self._interval = interval
        self._random = random.Random(1)
        self._running: dict[tuple[Link, int], asyncio.TimerHandle] = {}
        self._links: set[Link] = set()

    def connection(self) -> Link:
        """One gateway's connection."""
        return Link(ToWorker, self._heard, self._lost)

    async def tell_load(self) -> None:
        """Say how full it is, once a second, until cancelled."""
        while True:
            for link in self._links:
                link.send(self._load())
            await asyncio.sleep(LOAD_SECONDS)

    def _load(self) -> Load:
        return Load(
            free_blocks=POOL_BLOCKS,
            pool_blocks=POOL_BLOCKS,
            running=len(self._running),
            waiting=0,
            waiting_tokens=0,
        )

    def _heard(self, link: Link, message: Message) -> None:
        match message:
            case Hello():
                self._welcome(link)
            case Prefill():
                self._start(link, message.spec)
            case Cancel():
                timer = self._running.pop((link, message.handle), None)
                if timer is not None:
                    timer.cancel()
            case Inspect():
                link.send(self._ledger(message.ticket))

    def _welcome(self, link: Link) -> None:
        self._links.add(link)
        link.send(
            Welcome(
                version=VERSION,
                worker=self._name,
                incarnation=self.incarnation,
                role="both",
                info=INFO,
            )
        )
        link.send(self._load())

    def _ledger(self, ticket: int) -> Ledger:
        return Ledger(
            ticket=ticket,
            worker=self._name,
            pool_blocks=POOL_BLOCKS,
            free_blocks=POOL_BLOCKS,
            holders=(),
            balanced=True,
        )

    def _lost(self, link: Link, reason: str) -> None:
        self._links.discard(link)
        for key in [key for key in self._running if key[0] is link]:
            self._running.pop(key).cancel()

    def _start(self, link: Link, spec: RequestSpec) -> None:
        first = First(0, WORDS[0], "length" if spec.max_tokens == 1 else None)
        link.send(FirstToken(handle=spec.handle, first=(first,), wait=0.0, prefill=0.0))
        if first.finish is None:
            at = asyncio.get_running_loop().time() + self._random.random() * self._interval
            self._book(link, spec, 1, at)

    def _book(self, link: Link, spec: RequestSpec, position: int, at: float) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_at(at, self._tick, link, spec, position, at)
        self._running[link, spec.handle] = timer

    def _tick(self, link: Link, spec: RequestSpec, position: int, at: float) -> None:
        last = position + 1 == spec.max_tokens
        row = Token(
            spec.handle, 0, position, WORDS[position % len(WORDS)], "length" if last else None
        )
        link.send(Tokens(step=position, rows=(row,)))
        if last:
            del self._running[link, spec.handle]
        else:
            self._book(link, spec, position + 1, at + self._interval)


async def serve(asked: argparse.Namespace) -> None:
    """Register and serve until told to stop."""
    worker = Paced("paced", asked.interval)
    record = WorkerRecord(
        id="paced",
        incarnation=worker.incarnation,
        role="both",
        model=asked.model,
        address=f"unix:{asked.listen}",
        prefill_tokens=POOL_BLOCKS * BLOCK_TOKENS,
        decode_tokens=POOL_BLOCKS * BLOCK_TOKENS,
    )
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_unix_server(worker.connection, asked.listen)
    async with (
        server,
        open_redis(RedisSection(url=asked.redis)) as redis,
        asyncio.TaskGroup() as tasks,
    ):
        telling = tasks.create_task(worker.tell_load())
        await Registration(redis, asked.deployment, record).run(stop)
        telling.cancel()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, help="address of the Redis to register in")
    parser.add_argument("--deployment", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--listen", required=True, help="path of a Unix socket")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between tokens")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
