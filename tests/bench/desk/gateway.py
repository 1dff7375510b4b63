"""Ask two workers for a handoff, one request at a time, and note when each answer came."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from backends.api import Sampling
from backends.protocol import (
    Caller,
    Challenge,
    Failed,
    FirstToken,
    Granted,
    HandedOver,
    Landed,
    Link,
    Meet,
    Met,
    Prefill,
    Refused,
    Rejected,
    RequestSpec,
    Reserve,
    SequenceSpec,
    ToGateway,
    Tokens,
    Welcome,
)
from loadtest.bench.figures import ROOT
from loadtest.bench.process import NotStarted, running, wait_until
from tests.bench.desk.worker import Worker

START_SECONDS = 120.0
ANSWER_SECONDS = 60.0


class Handoff(msgspec.Struct, frozen=True):
    """One request's times, in seconds, by the gateway's clock unless a worker states them.

    `reserve`: from asking for a landing to having it. `prefill`: from asking to the first token.
    `landing`: from the first token to the news that decode has verified and admitted the prefix.
    `step`: from that news to the first decoded token. `verify`, `exposed`, `overlapped` and
    `bytes` are those of `HandedOver`.
    """

    reserve: float
    prefill: float
    landing: float
    step: float
    verify: float
    exposed: float
    overlapped: float
    bytes: int

    @property
    def until_decode(self) -> float:
        """From asking for the prefill to the first decoded token."""
        return self.prefill + self.landing + self.step


class Lost(Exception):
    """A worker refused, failed or went away."""


class Desk:
    """A gateway with one prefill and one decode worker that have met."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[tuple[float, Any]] = asyncio.Queue()
        self._kept: list[tuple[float, Any]] = []
        self._links: dict[str, Link] = {}
        self._handles = 0
        self.met = Met(worker="")

    async def connect(self, sockets: dict[str, str]) -> None:
        """Greet both workers and let them meet.

        Raises:
            Lost: they will not have us, or each other.
        """
        loop = asyncio.get_running_loop()
        welcomes: dict[str, Welcome] = {}
        for role, path in sockets.items():
            link = Link(ToGateway, self._hear, self._lost)
            await loop.create_unix_connection(lambda link=link: link, path)  # type: ignore[misc]
            self._links[role] = link
            caller = Caller("bench", "")
            link.send(caller.hello)
            _, challenge = await self._wait(Challenge)
            link.send(caller.prove(challenge))
            _, welcomes[role] = await self._wait(Welcome)
            link.trust()
        decode = welcomes["decode"]
        self._links["prefill"].send(
            Meet(
                worker=decode.worker,
                incarnation=decode.incarnation,
                layout=decode.info.layout,
                endpoints=decode.endpoints,
                exact=decode.info.continuation == "exact",
            )
        )
        _, self.met = await self._wait(Met)
        if self.met.refusal:
            raise Lost(self.met.refusal)

    async def hand_over(self, prompt: Sequence[int], *, tokens: int = 2) -> Handoff:
        """Have `prompt` prefilled by one worker and continued by the other.

        Raises:
            Lost: a worker refused or failed.
            TimeoutError: nothing was heard for too long.
        """
        self._handles += 1
        self._kept.clear()
        spec = RequestSpec(
            handle=self._handles,
            request=f"bench-{self._handles}",
            prompt=list(prompt),
            sequences=(SequenceSpec(index=0, seed=0),),
            sampling=Sampling(temperature=0.0, ignore_eos=True),
            max_tokens=tokens,
            deadline_seconds=ANSWER_SECONDS,
        )
        began = time.monotonic()
        self._links["decode"].send(Reserve(spec=spec, transport=self.met.transport))
        granted_at, granted = await self._wait(Granted)
        asked = time.monotonic()
        self._links["prefill"].send(Prefill(spec=spec, landing=granted.landing))
        first_at, _ = await self._wait(FirstToken)
        landed_at, _ = await self._wait(Landed)
        decoded_at, rows = await self._wait(Tokens)
        _, handed = await self._wait(HandedOver)
        while not rows.rows[-1].finish:
            _, rows = await self._wait(Tokens)
        return Handoff(
            reserve=granted_at - began,
            prefill=first_at - asked,
            landing=landed_at - first_at,
            step=decoded_at - landed_at,
            verify=handed.verify,
            exposed=handed.exposed,
            overlapped=handed.overlapped,
            bytes=handed.bytes,
        )

    def close(self) -> None:
        """Hang up."""
        for link in self._links.values():
            link.close()

    def _hear(self, link: Link, message: Any) -> None:
        self._heard.put_nowait((time.monotonic(), message))

    def _lost(self, link: Link, reason: str) -> None:
        self._heard.put_nowait((time.monotonic(), Lost(reason)))

    async def _wait(self, kind: type[Any]) -> tuple[float, Any]:
        """The next message of a kind, and when it came; others are kept for later."""
        for index, (at, message) in enumerate(self._kept):
            if isinstance(message, kind):
                del self._kept[index]
                return at, message
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                at, message = await self._heard.get()
                if isinstance(message, kind):
                    return at, message
                if isinstance(message, Lost):
                    raise message
                if isinstance(message, Failed | Refused | Rejected):
                    raise Lost(repr(message))
                self._kept.append((at, message))


@asynccontextmanager
async def desk(folder: Path, workers: Sequence[Worker]) -> AsyncIterator[Desk]:
    """Start both workers on a core each and connect to them; all is stopped at the end.

    Raises:
        NotStarted: a worker did not come up.
        Lost: they will not have us, or each other.
    """
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        for index, worker in enumerate(workers):
            log = folder / f"{worker.role}.log"
            encoded = msgspec.json.encode(worker).decode()
            process = stack.enter_context(
                running(
                    [sys.executable, "-m", "tests.bench.desk.worker", encoded],
                    log,
                    cores=frozenset({cores[index % len(cores)]}),
                    environment={"PYTHONPATH": str(ROOT)},
                )
            )
            wait_until(Path(worker.socket).exists, process, log, START_SECONDS)
        one = Desk()
        await one.connect({worker.role: worker.socket for worker in workers})
        try:
            yield one
        finally:
            one.close()


__all__ = ["Desk", "Handoff", "Lost", "NotStarted", "desk"]
