"""The processes of the game: production code, put together as `gateway.server` and `cli` do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from backends.api import Row
from backends.host import HostConfig, WorkerHost
from backends.host.peers import Peers
from backends.protocol import Sampling
from gateway.admission import Admission, Limits, Registration, Registry, WorkerRecord
from gateway.errors import GatewayError, Repeated
from gateway.life.fleet import Fleet
from gateway.life.job import Job, Take
from gateway.life.relay import Relay
from gateway.resume import Claim, JobClaim, Records, Retention, Saved
from tests.chaos.control import plot, redis_server
from tests.chaos.control.backend import TinyBackend
from tests.chaos.control.prompts import number_of
from tests.chaos.control.transport import WireReceiver, WireSender
from tests.chaos.control.world import ProcessLoop

if TYPE_CHECKING:
    from tests.chaos.control.game import Game

MODEL = "tiny"
DEPLOYMENT = "chaos"
CONTROL_PORT, DATA_PORT, FRONT_PORT = 1, 2, 80
STEP_TOKENS = 8


class Process:
    """One start of one process. `slot` is its name, which the next start of it inherits."""

    def __init__(self, game: Game, slot: str) -> None:
        self.game = game
        self.slot = slot
        self.loop = ProcessLoop(game.world, slot, begins=1000 * game.dice("clock", slot))
        self.loop.sockets = game.network
        self.loop.complain = lambda complaint: game.blame(f"{slot}: {complaint}")
        self.main: asyncio.Task[None] | None = None
        self.drained: Callable[[], None] | None = None

    def __str__(self) -> str:
        return self.slot

    @property
    def alive(self) -> bool:
        """Whether it has not crashed."""
        return not self.loop.dead

    def launch(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin with its main task, whose end is a finding."""
        self.main = self.loop.create_task(work)
        self.main.add_done_callback(self._ended)

    def _ended(self, main: asyncio.Task[None]) -> None:
        if self.alive and not self.game.world.over:
            if self.drained is not None and main.exception() is None:
                self.drained()
                return
            error = None if main.cancelled() else main.exception()
            self.game.blame(f"{self.slot} ended by itself: {error!r}")

    def die(self) -> None:
        """SIGKILL."""
        self.game.network.abandon(self.loop)
        self.loop.die()


class RedisProcess(Process):
    """The server, with what an earlier start has left on disk."""

    def __init__(self, game: Game, slot: str, kept: Any = None) -> None:
        super().__init__(game, slot)
        self.server = redis_server.Server(self.loop, kept, game.parts.lua)
        self.server.after = partial(game.checks.script, self.server)
        game.checks.redis_began(self.server)
        address = f"{redis_server.HOST}:{redis_server.PORT}"
        game.network.listen(self.loop, self.server.session, address)


class GatewayProcess(Process):
    """A gateway without its HTTP side; `Front` stands for that."""

    def __init__(self, game: Game, slot: str, number: int) -> None:
        super().__init__(game, slot)
        self.id = f"{slot}.{number}"
        redis: Any = redis_server.Redis()
        limits = Limits(
            lease_seconds=plot.LEASE_SECONDS,
            worker_wait_seconds=plot.WORKER_WAIT_SECONDS,
            outage_seconds=plot.OUTAGE_SECONDS,
            timeout_seconds=plot.REDIS_TIMEOUT_SECONDS,
        )
        self.admission = Admission(redis, DEPLOYMENT, self.id, limits)
        self.registry = Registry(
            redis,
            DEPLOYMENT,
            lease_seconds=plot.LEASE_SECONDS,
            timeout_seconds=plot.REDIS_TIMEOUT_SECONDS,
        )
        self.fleet = Fleet(self.id, "", silence_seconds=plot.SILENCE_SECONDS)
        self.relay = Relay(
            self.admission,
            self.fleet,
            max_retries=plot.MAX_RETRIES,
            worker_wait_seconds=plot.WORKER_WAIT_SECONDS,
        )
        retention = Retention(keep_seconds=plot.KEEP_SECONDS)
        self.records = Records(
            redis, DEPLOYMENT, self.id, retention, timeout_seconds=plot.REDIS_TIMEOUT_SECONDS
        )
        self.jobs: dict[int, Job] = {}
        self.launch(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for part in (
                self.admission.run(),
                self.registry.watch(self._learn),
                self.fleet.run(),
                self.records.run(),
            ):
                tasks.create_task(part)
            await self.loop.create_server(lambda: Front(self), self.slot, FRONT_PORT)

    def _learn(self, records: Mapping[str, WorkerRecord]) -> None:
        self.fleet.update(records)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A handler of one HTTP request."""
        return self._tasks.create_task(work)

    def state(self, number: int) -> str:
        """Where a request is, one of `plot.STATES`."""
        job = self.jobs.get(number)
        run = self.relay._runs.get(job) if job is not None and self.alive else None
        lives = [life.state.value for life in run.lives] if run is not None else []
        return min((it for it in lives if it in plot.STATES), key=plot.STATES.index, default="over")

    @property
    def idle(self) -> bool:
        """Whether it holds nothing and owes nothing."""
        admission = self.admission
        return not (self.relay.running or admission._turns or admission._leaving.qsize())


class Front(asyncio.Protocol):
    """One client's connection: a job in, tokens and one ending out."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._transport: Any = None
        self._task: asyncio.Task[None] | None = None
        self._request = ""
        self._skip: list[int] = []
        self._told = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: Any) -> None:
        self._task = self._gateway.spawn(self._serve(*data))

    async def _serve(
        self,
        what: str,
        number: int,
        asked: dict[str, Any],
        seconds: float,
        key: str,
        last: str,
        told: tuple[int, ...],
    ) -> None:
        self._request = asked["id"]
        try:
            if key:
                await self._claimed(number, asked, seconds, key, last, told)
            else:
                await self._carry(number, asked, seconds, None)
        except GatewayError as error:
            self._end(number, type(error).__name__, str(error))
        else:
            self._end(number, "done", "")

    async def _claimed(
        self,
        number: int,
        asked: dict[str, Any],
        seconds: float,
        key: str,
        last: str,
        told: tuple[int, ...],
    ) -> None:
        """As `gateway.api.endpoints` does with `Idempotency-Key` and `Last-Event-ID`."""
        records, tenant = self._gateway.records, asked["tenant"]
        if last:
            claim = await records.take(tenant, last)
        else:
            saved = Saved(
                id=asked["id"],
                route="completion",
                body=b"",
                created=0,
                seed=0,
                prompts=(asked["prompt"],),
            )
            claim = records.open(tenant, key, saved, seconds=seconds)
            try:
                await self._owned(number, asked, claim, told)
                return
            except Repeated as repeated:
                claim = repeated.claim
        await self._owned(number, asked, claim, told)

    async def _owned(
        self, number: int, asked: dict[str, Any], claim: Claim, told: tuple[int, ...]
    ) -> None:
        self._skip, self._request = list(told), claim.id
        (job,) = claim.jobs(told, len(asked["seeds"]))
        try:
            await self._carry(number, asked, claim.left, job)
        except GatewayError as error:
            claim.failed(error, told=self._told)
            raise
        finally:
            claim.close()

    async def _carry(
        self, number: int, asked: dict[str, Any], seconds: float, claim: JobClaim | None
    ) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        job = Job(model=MODEL, sampling=Sampling(), deadline=deadline, claim=claim, **asked)
        self._gateway.jobs[number] = job
        await self._gateway.relay.carry(job, self)

    def _end(self, number: int, kind: str, detail: str) -> None:
        self._transport.write(("end", number, kind, detail))
        self._transport.close()

    def sequence(self, index: int) -> Take:
        """As `Listener.sequence`."""
        return partial(self._take, index)

    def _take(self, index: int, token: int, finish: Any, logprob: Any) -> bool:
        if index < len(self._skip) and self._skip[index] > 0:
            self._skip[index] -= 1
            return False
        self._told = True
        self._transport.write(("token", self._request, index, token, finish))
        return False

    def prompt_logprobs(self, logprobs: Any) -> None:
        """As `Listener.prompt_logprobs`."""


class WiredPeers(Peers):
    """A worker's data plane in the game's network."""

    def _sender(self, name: str) -> Any:
        return WireSender()

    def _receiver(self, name: str, number: int, of: Any, *_: Any) -> Any:
        return WireReceiver(of.layout, of.memory, f"{self._config.id}:{DATA_PORT}")


class WorkerProcess(Process):
    """A worker: the host around the tiny backend, and its record in Redis."""

    def __init__(self, game: Game, slot: str, number: int) -> None:
        super().__init__(game, slot)
        role: Any = "prefill" if slot in plot.PREFILLS else "decode"
        backend: Any = TinyBackend(
            plot.POOL_BLOCKS[role],
            computing=self._computing,
            wrong=lambda what: game.blame(f"{slot}: {what}"),
        )
        config = HostConfig(
            id=slot,
            role=role,
            listen=f"tcp:{slot}:{CONTROL_PORT}",
            lease_seconds=plot.LANDING_SECONDS,
            step_tokens=STEP_TOKENS,
            commit_timeout_seconds=plot.COMMIT_SECONDS,
            quarantine_share=0.5,
            transports=("tcp",),
            drain_seconds=plot.DRAIN_SECONDS,
        )
        self.fails_until = 0.0
        self.loop.step_seconds = self._step_seconds
        self.pool = backend.pool
        self.host = WorkerHost(config, backend, peers=WiredPeers)
        self.requests = self.host._requests
        self.ledger = self.host._ledger
        self._pace: Callable[[], float] = partial(game.random.uniform, 0.002, 0.02)
        self.launch(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            listening = asyncio.Event()
            tasks.create_task(self.host.run(listening.set))
            await listening.wait()
            for receiver in self.host._peers._receivers:
                self.game.checks.watch(self, receiver)
            prefill_tokens, decode_tokens = plot.OFFERS[self.host.config.role]
            record = WorkerRecord(
                id=self.slot,
                incarnation=self.host.incarnation,
                role=self.host.config.role,
                model=MODEL,
                address=self.host.address,
                prefill_tokens=prefill_tokens,
                decode_tokens=decode_tokens,
            )
            redis: Any = redis_server.Redis()
            registration = Registration(
                redis,
                DEPLOYMENT,
                record,
                lease_seconds=plot.LEASE_SECONDS,
                timeout_seconds=plot.REDIS_TIMEOUT_SECONDS,
            )
            await registration.run(self.host.draining)

    def drain(self, drained: Callable[[], None]) -> None:
        """SIGTERM. `drained` is called when it has ended."""

        def ended() -> None:
            if not self.requests.quiet:
                self.game.blame(f"{self} has drained, and holds {self.ledger.holders()}")
            drained()

        if self.drained is None:
            self.drained = ended
            self.loop.call_soon(self.host.drain)

    def idle_blocks(self) -> list[int]:
        """What it keeps for later prefixes, and nobody holds."""
        held = {block for blocks in self.ledger._held.values() for block in blocks}
        kept = self.requests.reuse.prefixes._by_block
        return sorted(it for it, entry in kept.items() if entry.proof and it not in held)

    def _step_seconds(self) -> float:
        return self._pace()

    def _computing(self, batch: Sequence[Row]) -> None:
        for row in batch:
            point = "compute" if len(row.tokens) > 1 else "step"
            known = (
                row.sequences[0].prompt if row.sequences else row.tokens if not row.start else ()
            )
            number = number_of(known)
            if number is not None:
                self.game.checks.computing(self, number)
                self.game.strike(number, point)
        if self.game.world.now < self.fails_until:
            raise RuntimeError("the device fails")

    @property
    def left(self) -> str:
        """What it still holds; empty when nothing."""
        requests, janitor = self.requests, self.host._janitor
        if self.ledger.free < self.ledger.blocks:
            return f"{self.slot} holds {self.ledger.holders()}"
        if not requests.idle or len(requests.landings) or janitor.errands:
            return f"{self.slot} is not idle"
        return ""
