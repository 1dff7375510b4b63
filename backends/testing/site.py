"""Worker hosts around plug-ins, over real sockets, and a gateway in a few lines to talk to them."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from collections.abc import Sequence as Items
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self, cast

import msgspec

from backends.api import Backend, Output, Ready, Row, Sampling, SteppedBackend
from backends.host import HostConfig, WorkerHost
from backends.protocol import (
    LENGTH,
    Caller,
    Cancel,
    Challenge,
    Failed,
    FirstToken,
    Granted,
    Inspect,
    Landing,
    Ledger,
    Meet,
    Message,
    Met,
    Prefill,
    Refused,
    RequestSpec,
    Reserve,
    Role,
    SequenceSpec,
    ToGateway,
    Token,
    Tokens,
    Welcome,
    frame,
)
from backends.testing.form import Broken, described

PATIENCE_SECONDS = 60.0


class Lent:
    """A backend that outlives the worker it is lent to."""

    def __init__(self, backend: SteppedBackend) -> None:
        """Everything but `close` is the backend's own."""
        self._backend = backend
        self.info, self.pool = backend.info, backend.pool

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """As `SteppedBackend.step`."""
        return self._backend.step(batch, ready)

    def ingest(self, blocks: Items[int]) -> None:
        """As `SteppedBackend.ingest`."""
        self._backend.ingest(blocks)

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """As `SteppedBackend.copy_blocks`."""
        self._backend.copy_blocks(pairs)

    def close(self) -> None:
        """Nothing: whoever lent it closes it."""


class Turnstile(Lent):
    """Holds one step up in the middle of what it is, to have something happen meanwhile."""

    def __init__(self, backend: SteppedBackend) -> None:
        """Nothing is held."""
        super().__init__(backend)
        self._left = 0
        self._failure = ""
        self._holding = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def hold(self, count: int) -> None:
        """Hold up the step after `count - 1` others."""
        self._holding.clear()
        self._open.clear()
        self._left = count

    async def held(self) -> None:
        """Wait until it is there.

        Raises:
            Broken: it never comes, or a step failed before.
        """
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not self._holding.is_set() and not self._failure:  # noqa: ASYNC110 -- two threads
                    await asyncio.sleep(0.001)
        except TimeoutError as error:
            raise Broken("worker: it does not step") from error
        if self._failure:
            raise Broken(f"worker: a step failed: {self._failure}")

    def let_pass(self) -> None:
        """Let it go on."""
        self._open.set()

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """As `SteppedBackend.step`."""
        self._left -= 1
        if self._left == 0:
            self._holding.set()
            self._open.wait(PATIENCE_SECONDS)
        try:
            return super().step(batch, ready)
        except Exception as error:
            self._failure = described(error)
            raise


class Wire:
    """A gateway's control connection to one worker."""

    welcome: Welcome

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Nobody has greeted yet."""
        self._reader, self._writer = reader, writer
        self._tickets = 0

    async def greet(self) -> Self:
        """Prove that we know the (empty) secret; hear who it is."""
        caller = Caller("kit", "")
        self.send(caller.hello)
        self.send(caller.prove(await self.hear(Challenge)))
        self.welcome = await self.hear(Welcome)
        caller.check(self.welcome)
        return self

    def send(self, message: Message) -> None:
        """Say something."""
        self._writer.write(frame(message))

    async def hear(self, *kinds: type[Message]) -> Any:
        """The next message of one of these kinds; others are dropped.

        Raises:
            Broken: none came in time, or the worker is gone.
        """
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                    body = await self._reader.readexactly(length)
                    message: Any = msgspec.msgpack.decode(body, type=ToGateway)
                    if isinstance(message, kinds):
                        return message
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise Broken(f"worker: it never said {names}: {type(error).__name__}") from error

    async def balanced(self) -> None:
        """Wait until every block is free and the books balance.

        Raises:
            Broken: they never do.
        """
        ledger: Ledger | None = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while ledger is None or ledger.free_blocks < ledger.pool_blocks:
                    self._tickets += 1
                    self.send(Inspect(ticket=self._tickets))
                    ledger = await self.hear(Ledger)
        except TimeoutError as error:
            held = ledger.holders if ledger is not None else ()
            raise Broken(f"worker: blocks never came free: {held}") from error
        if not ledger.balanced:
            raise Broken(f"worker: its books do not balance: {ledger.note}")

    def close(self) -> None:
        """Leave."""
        self._writer.close()


class Site:
    """Some workers in this process; one gateway, which is connected to each of them."""

    def __init__(self, folder: Path, tasks: asyncio.TaskGroup, stack: AsyncExitStack) -> None:
        """No worker yet; `site` is the way in."""
        self._folder, self._tasks, self._stack = folder, tasks, stack
        self._handles = 0

    async def start(self, role: Role, backend: Backend, **config: Any) -> Wire:
        """A worker of that role around `backend`, which stays the caller's.

        An engine must be one whose `close` leaves it open.
        """
        name = f"{role}-{self._handles}"
        path = self._folder / f"{name}.sock"
        settings = HostConfig(id=name, role=role, listen=f"unix:{path}", **config)
        ready = asyncio.Event()
        if backend.info.kind == "stepped" and not isinstance(backend, Lent):
            backend = Lent(cast("SteppedBackend", backend))
        running = self._tasks.create_task(WorkerHost(settings, backend).run(ready.set))
        self._stack.callback(running.cancel)
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        wire = await Wire(*await asyncio.open_unix_connection(str(path))).greet()
        self._stack.callback(wire.close)
        self._handles += 1
        return wire

    def spec(
        self, prompt: list[int], sampling: Sampling, tokens: int, seeds: Iterable[int] = (0,)
    ) -> RequestSpec:
        """A request of its own."""
        self._handles += 1
        return RequestSpec(
            handle=self._handles * 256,
            request=f"kit-{self._handles}",
            prompt=prompt,
            sequences=tuple(SequenceSpec(index=i, seed=seed) for i, seed in enumerate(seeds)),
            sampling=sampling,
            max_tokens=tokens,
            deadline_seconds=PATIENCE_SECONDS,
        )


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    """An empty site, whose workers end with it."""
    with tempfile.TemporaryDirectory(prefix="baton-kit-") as folder:
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
            yield Site(Path(folder), tasks, stack)


async def meet(prefill: Wire, decode: Wire) -> str:
    """Have two workers connect; answers with the transport that they chose.

    Raises:
        Broken: they cannot.
    """
    there = decode.welcome
    info = there.info
    prefill.send(
        Meet(
            worker=there.worker,
            incarnation=there.incarnation,
            layout=info.layout,
            endpoints=there.endpoints,
            shards=info.shards,
        )
    )
    met: Met = await prefill.hear(Met)
    if met.refusal:
        raise Broken(f"worker: a pair of it cannot hand over: {met.refusal}")
    return met.transport


async def reserve(prefill: Wire, decode: Wire, spec: RequestSpec, transport: str) -> Landing:
    """A landing for `spec`.

    Raises:
        Broken: it is refused.
    """
    here = prefill.welcome
    decode.send(
        Reserve(spec=spec, prefill=here.worker, transport=transport, sources=here.info.shards)
    )
    answer = await decode.hear(Granted, Refused)
    if isinstance(answer, Refused):
        raise Broken(f"worker: it refused a landing: {answer.detail}")
    landing: Landing = answer.landing
    return landing


async def text_of(first: Wire, others: Wire, spec: RequestSpec) -> dict[int, list[Token]]:
    """All tokens of a request: the first of each sequence from one worker, others from another.

    Raises:
        Broken: it is refused, fails, or a token is missing or comes twice.
    """
    answer = await first.hear(FirstToken, Refused, Failed)
    if not isinstance(answer, FirstToken):
        raise Broken(f"worker: the request came to nothing: {answer.detail}")
    found = {
        it.index: [Token(spec.handle, it.index, 0, it.token, it.finish)] for it in answer.first
    }
    while any(line[-1].finish is None for line in found.values()):
        answer = await others.hear(Tokens, Failed)
        if isinstance(answer, Failed):
            raise Broken(f"worker: the request failed: {answer.detail}")
        for token in answer.rows:
            if token.handle == spec.handle:
                line = found[token.index]
                if token.position != len(line) or line[-1].finish is not None:
                    raise Broken(f"worker: token {token.position} came after {len(line)} others")
                line.append(token)
    return found


async def say(wire: Wire, spec: RequestSpec) -> dict[int, list[Token]]:
    """Prefill and decode in one worker; as `text_of`."""
    wire.send(Prefill(spec=spec, decode_here=True))
    return await text_of(wire, wire, spec)


async def hand_over(
    prefill: Wire, decode: Wire, spec: RequestSpec, transport: str
) -> dict[int, list[Token]]:
    """Prefill in one worker, decode in another; as `text_of`."""
    landing = await reserve(prefill, decode, spec, transport)
    prefill.send(Prefill(spec=spec, landing=landing))
    return await text_of(prefill, decode, spec)


async def cancel(spec: RequestSpec, *wires: Wire, meanwhile: Callable[[], None]) -> None:
    """Stop a request and wait until nothing is left of it; `meanwhile` is called once they know."""
    for wire in wires:
        wire.send(Cancel(handle=spec.handle))
        wire.send(Inspect(ticket=0))
    for wire in wires:
        await wire.hear(Ledger)
    meanwhile()
    for wire in wires:
        await wire.balanced()
