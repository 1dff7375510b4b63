"""Workers that only say what workers say: load on a gateway from the other end.

They speak the gateway's control protocol and register as any worker does, but have no engine and
move no KV, so that a whole machine's worth of traffic fits beside the load generator on a core.

`Paced`, in role `both`: the first token of a request leaves at once, the others one per interval
from a random moment on, each in a frame by itself. That is the hardest case for a gateway:
nothing arrives together that could be handled together. `Prefiller` and `Decoder` are a pair
that plays the whole exchange of a disaggregated request, with one frame per step for all.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import time

import uvloop
from redis.asyncio import Redis

from backends.protocol import (
    BackendInfo,
    Cancel,
    Door,
    FinishReason,
    First,
    FirstToken,
    Granted,
    HandedOver,
    Hello,
    Inspect,
    Landed,
    Landing,
    Ledger,
    Link,
    Load,
    Meet,
    Message,
    Met,
    Prefill,
    Proof,
    RequestSpec,
    Reserve,
    Role,
    Sampling,
    Token,
    Tokens,
    ToWorker,
    Welcome,
)
from gateway.admission import Registration, WorkerRecord, open_redis
from gateway.config import RedisSection
from transfer.layout import Endpoint, Epoch, KVLayout

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


class StandIn:
    """What every worker does: greet gateways, tell its load, show its (empty) ledger."""

    role: Role

    def __init__(self, name: str, interval: float) -> None:
        self.name = name
        self.incarnation = time.time_ns()
        self.interval = interval
        self._links: set[Link] = set()
        self._doors: dict[Link, Door] = {}

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
            running=0,
            waiting=0,
            waiting_tokens=0,
        )

    def _heard(self, link: Link, message: Message) -> None:
        match message:
            case Hello():
                door = self._doors[link] = Door(message, secret="")
                link.send(door.challenge)
            case Proof():
                link.trust()
                self._welcome(link, self._doors.pop(link))
            case Inspect():
                link.send(self._ledger(message.ticket))
            case _:
                self.do(link, message)

    def do(self, link: Link, message: Message) -> None:
        """Answer anything else."""

    def _welcome(self, link: Link, door: Door) -> None:
        self._links.add(link)
        welcome = Welcome(
            version=door.version,
            worker=self.name,
            incarnation=self.incarnation,
            role=self.role,
            info=INFO,
            endpoints=(Endpoint("none", self.name),),
        )
        link.send(door.seal(welcome))
        link.send(self._load())

    def _ledger(self, ticket: int) -> Ledger:
        return Ledger(
            ticket=ticket,
            worker=self.name,
            pool_blocks=POOL_BLOCKS,
            free_blocks=POOL_BLOCKS,
            holders=(),
            balanced=True,
        )

    def _lost(self, link: Link, reason: str) -> None:
        self._links.discard(link)

    async def run(self, redis: Redis, asked: argparse.Namespace, stop: asyncio.Event) -> None:
        """Listen and be registered until `stop`."""
        path = f"{asked.listen}/{self.name}.sock"
        tokens = POOL_BLOCKS * BLOCK_TOKENS
        record = WorkerRecord(
            id=self.name,
            incarnation=self.incarnation,
            role=self.role,
            model=asked.model,
            address=f"unix:{path}",
            prefill_tokens=0 if self.role == "decode" else tokens,
            decode_tokens=0 if self.role == "prefill" else tokens,
        )
        loop = asyncio.get_running_loop()
        async with (
            await loop.create_unix_server(self.connection, path),
            asyncio.TaskGroup() as tasks,
        ):
            telling = tasks.create_task(self.tell_load())
            stepping = tasks.create_task(self.step())
            await Registration(redis, asked.deployment, record).run(stop)
            telling.cancel()
            stepping.cancel()

    async def step(self) -> None:
        """Whatever it does by itself."""


class Paced(StandIn):
    """Each stream on a clock of its own."""

    role: Role = "both"

    def __init__(self, name: str, interval: float) -> None:
        super().__init__(name, interval)
        self._random = random.Random(1)
        self._running: dict[tuple[Link, int], asyncio.TimerHandle] = {}

    def do(self, link: Link, message: Message) -> None:
        if isinstance(message, Prefill):
            self._start(link, message.spec)
        elif isinstance(message, Cancel):
            timer = self._running.pop((link, message.handle), None)
            if timer is not None:
                timer.cancel()

    def _lost(self, link: Link, reason: str) -> None:
        super()._lost(link, reason)
        for key in [key for key in self._running if key[0] is link]:
            self._running.pop(key).cancel()

    def _start(self, link: Link, spec: RequestSpec) -> None:
        first = First(0, WORDS[0], "length" if spec.max_tokens == 1 else None)
        link.send(FirstToken(handle=spec.handle, first=(first,), wait=0.0, prefill=0.0))
        if first.finish is None:
            at = asyncio.get_running_loop().time() + self._random.random() * self.interval
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
            self._book(link, spec, position + 1, at + self.interval)


class Prefiller(StandIn):
    """Says at once that a prompt is computed and handed over to `decoder`."""

    role: Role = "prefill"

    def __init__(self, name: str, interval: float, decoder: Decoder) -> None:
        super().__init__(name, interval)
        self._decoder = decoder

    def do(self, link: Link, message: Message) -> None:
        if isinstance(message, Meet):
            link.send(Met(worker=message.worker, transport="none", plan="nothing is moved"))
        elif isinstance(message, Prefill):
            spec = message.spec
            firsts = tuple(First(one.index, WORDS[0]) for one in spec.sequences)
            link.send(FirstToken(handle=spec.handle, first=firsts, wait=0.0, prefill=0.0))
            link.send(
                HandedOver(handle=spec.handle, bytes=0, exposed=0.0, overlapped=0.0, verify=0.0)
            )
            if message.landing is not None:
                self._decoder.admit(message.landing.id)


class Decoder(StandIn):
    """Grants every landing, and steps: one token for each of its sequences, in one frame."""

    role: Role = "decode"

    def __init__(self, name: str, interval: float) -> None:
        super().__init__(name, interval)
        self._running: dict[tuple[Link, int], tuple[RequestSpec, int]] = {}
        self._reserved: dict[str, tuple[Link, RequestSpec]] = {}
        self._granted = 0

    def admit(self, landing: str) -> None:
        """The prefix has arrived."""
        link, spec = self._reserved.pop(landing)
        link.send(Landed(handle=spec.handle, verify=0.0))
        self._running[link, spec.handle] = (spec, 1)

    def do(self, link: Link, message: Message) -> None:
        if isinstance(message, Reserve):
            self._granted += 1
            landing = self._landing(message.spec)
            self._reserved[landing.id] = (link, message.spec)
            link.send(Granted(handle=message.spec.handle, landing=landing))
        elif isinstance(message, Cancel):
            self._running.pop((link, message.handle), None)

    def _lost(self, link: Link, reason: str) -> None:
        super()._lost(link, reason)
        for key in [key for key in self._running if key[0] is link]:
            del self._running[key]

    def _landing(self, spec: RequestSpec) -> Landing:
        return Landing(
            id=str(self._granted),
            epoch=Epoch(self.incarnation, self._granted),
            secret=b"",
            worker=self.name,
            endpoints=(),
            layout=INFO.layout,
            pool_blocks=POOL_BLOCKS,
            blocks=tuple(range(INFO.layout.blocks_for(len(spec.prompt)))),
            tokens=len(spec.prompt),
            lease_seconds=60.0,
        )

    async def step(self) -> None:
        due = asyncio.get_running_loop().time()
        count = 0
        while True:
            due += self.interval
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            count += 1
            frames: dict[Link, list[Token]] = {}
            for (link, handle), (spec, position) in list(self._running.items()):
                last = position + 1 >= spec.max_tokens
                word = WORDS[position % len(WORDS)]
                finish: FinishReason | None = "length" if last else None
                rows = frames.setdefault(link, [])
                rows += (Token(handle, o.index, position, word, finish) for o in spec.sequences)
                if last:
                    del self._running[link, handle]
                else:
                    self._running[link, handle] = (spec, position + 1)
            for link, rows in frames.items():
                link.send(Tokens(step=count, rows=tuple(rows)))


def cast(name: str, interval: float) -> tuple[StandIn, ...]:
    """The workers that play `paced` or `pair`."""
    if name == "paced":
        return (Paced("paced", interval),)
    decoder = Decoder("decoder", interval)
    return (Prefiller("prefiller", interval, decoder), decoder)


async def serve(asked: argparse.Namespace) -> None:
    """Register and serve until told to stop."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with (
        open_redis(RedisSection(url=asked.redis)) as redis,
        asyncio.TaskGroup() as tasks,
    ):
        for worker in cast(asked.cast, asked.interval):
            tasks.create_task(worker.run(redis, asked, stop))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, help="address of the Redis to register in")
    parser.add_argument("--deployment", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--listen", required=True, help="folder for Unix sockets")
    parser.add_argument("--cast", choices=["paced", "pair"], default="paced")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between tokens")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
