"""A relay of forty lines for tests of the HTTP side, and that side served as in production."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from backends.protocol import FinishReason, Logprob
from gateway.api import Service, build_app
from gateway.errors import NoSuchWorker
from gateway.life.job import Job, Listener, Timeline
from gateway.tenants import ANYONE, Keyring
from gateway.text import Vocabulary
from tests.support.patience import PATIENCE_SECONDS

MODEL = "smollm2"
SAID = "Hello there, 🙃 friend."
CACHED = 1  # token of each prompt was there already
END = 2
DRAINABLE = "d0"


class ScriptedCarrier:
    """Says `tokens` in every sequence, then the end token; again and again with `ignore_eos`.

    `before` is awaited before each step, `failures` are raised at theirs.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.jobs: list[Job] = []
        self.running = 0
        self.steps = 0
        self.pauses: list[tuple[str, int, bool]] = []
        self.failures: dict[int, Exception] = {}
        self.before: Callable[[int], Awaitable[None]] | None = None
        self._paused: set[tuple[str, int]] = set()

    async def carry(self, job: Job, listener: Listener) -> Timeline:
        if job.claim is not None:
            await job.claim.secured()
        self.jobs.append(job)
        self.running += 1
        try:
            if job.prompt_logprobs is not None and len(job.prompt) > 1:
                logprobs = (self._logprob(job, token) for token in job.prompt[1:])
                listener.prompt_logprobs(tuple(one for one in logprobs if one))
            await self._decode(job, listener)
        finally:
            self.running -= 1
        return Timeline(
            prefill_worker="p0", decode_worker="d0", first_token=0.001, cached_tokens=CACHED
        )

    def pause(self, job: Job, index: int, paused: bool) -> None:
        self.pauses.append((job.id, index, paused))
        (self._paused.add if paused else self._paused.discard)((job.id, index))

    async def _decode(self, job: Job, listener: Listener) -> None:
        live = dict.fromkeys(range(job.n), 0)
        takes = [listener.sequence(index) for index in live]
        step = 0
        while live:
            if step in self.failures:
                raise self.failures[step]
            if self.before is not None:
                await self.before(step)
            for index, position in list(live.items()):
                if (job.id, index) in self._paused:
                    continue
                token, finish = self._token(job, position)
                live[index] += 1
                stopped = takes[index](token, finish, self._logprob(job, token))
                if stopped or finish is not None:
                    del live[index]
            step += 1
            self.steps += 1
            await asyncio.sleep(0)

    def _token(self, job: Job, position: int) -> tuple[int, FinishReason | None]:
        if not job.sampling.ignore_eos and position >= len(self.tokens):
            return END, "stop"
        token = self.tokens[position % len(self.tokens)]
        if token in job.sampling.stop_token_ids:
            return token, "stop"
        return token, "length" if position + 1 == job.max_tokens else None

    def _logprob(self, job: Job, token: int) -> Logprob | None:
        if job.sampling.logprobs is None:
            return None
        return Logprob(token, -0.25, ((token, -0.25), (0, -2.0))[: job.sampling.logprobs])


class Served:
    """A running HTTP side: where it is, its carrier, and what it observed."""

    def __init__(self, url: str, service: Service, carrier: ScriptedCarrier) -> None:
        self.url = url
        self.service = service
        self.carrier = carrier
        self.observed: list[dict[str, Any]] = []


def keyring(api_keys: frozenset[str]) -> Keyring:
    """Keys as the configuration writes them, `KEY` or `TENANT:KEY`, and none besides."""
    pairs = (key.rpartition(":") for key in api_keys)
    keys = {key: tenant or ANYONE for tenant, _, key in pairs}
    return Keyring(keys, trusting=True, elsewhere=False)


@asynccontextmanager
async def serving(
    vocabulary: Vocabulary,
    *,
    said: str = SAID,
    api_keys: frozenset[str] = frozenset(),
    **settings: Any,
) -> AsyncIterator[Served]:
    """The HTTP side on a port of its own, under the runner that production uses."""
    carrier = ScriptedCarrier(vocabulary.encode(said, add_special_tokens=False))
    observed: list[dict[str, Any]] = []

    async def ledger() -> dict[str, Any]:
        return {"balanced": True, "workers": []}

    async def drain(worker: str) -> None:
        if worker != DRAINABLE:
            raise NoSuchWorker(f"no worker `{worker}` is connected")

    names = ("route", "status", "timeline", "prompt_tokens", "completion_tokens",
             "seconds_to_first_token", "total_seconds")  # fmt: skip

    def observe(*values: Any, **named: Any) -> None:
        observed.append(dict(zip(names, values, strict=False)) | named)

    service = Service(
        **{
            "carrier": carrier,
            "text": vocabulary,
            "models": (MODEL,),
            "ready": lambda: None,
            "ledger": ledger,
            "workers": lambda: {"workers": [], "pairs": []},
            "drain": drain,
            "request": lambda _: None,
            "registry": CollectorRegistry(),
            "observe": observe,
            "keyring": keyring(api_keys),
            **settings,
        }
    )
    runner = web.AppRunner(build_app(service), handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        served = Served(f"http://{host}:{port}", service, carrier)
        served.observed = observed
        yield served
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for an effect."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
