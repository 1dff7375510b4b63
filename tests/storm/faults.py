"""What is done to whom, and when: drawn beforehand from a seed."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from typing import Literal

import msgspec

from tests.storm.site import DECODES, GATEWAYS, PREFILLS, Part, Site

MEMBERS = (*GATEWAYS, *PREFILLS, *DECODES)
STOPS = (0.1, 0.5, 1.0, 3.0, 12.0)  # the last is longer than any patience with a silent peer
STOP_WEIGHTS = (4, 4, 4, 2, 1)
RESTART_SECONDS = 0.1


class Fault(msgspec.Struct, frozen=True):
    """SIGKILL, or SIGSTOP and after `seconds` SIGCONT, at a time from the start of the storm."""

    at: float
    target: str
    kind: Literal["kill", "stop"]
    seconds: float = 0.0


def schedule(seed: int, seconds: float, every: float, redis_every: float = 30.0) -> list[Fault]:
    """A fault each `every` seconds, one of Redis at most each `redis_every`."""
    return list(_schedule(random.Random(seed), seconds, every, redis_every))


def _schedule(
    dice: random.Random, seconds: float, every: float, redis_every: float
) -> Iterator[Fault]:
    asleep: dict[str, float] = {}
    redis_at = redis_every * dice.uniform(0.3, 1)
    at = every
    while at < seconds:
        if at >= redis_at:
            target, redis_at = "redis", at + redis_every * dice.uniform(1, 1.5)
        else:
            target = dice.choice([name for name in MEMBERS if asleep.get(name, 0) < at])
        if dice.random() < 0.5:
            yield Fault(at, target, "kill")
        else:
            pause = dice.choices(STOPS, STOP_WEIGHTS)[0]
            asleep[target] = at + pause
            yield Fault(at, target, "stop", pause)
        at += every


class Fate:
    """Carries a schedule out, and starts again what was killed."""

    def __init__(self, site: Site, faults: list[Fault]) -> None:
        self.done: list[Fault] = []
        self.kills: list[tuple[float, str]] = []
        self._down: set[str] = set()
        self._site = site
        self._faults = faults

    async def run(self) -> None:
        """Return when all is done, and everything runs again.

        Whoever is still starting is spared: on a busy machine nothing would ever come up.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for fault in self._faults:
                await asyncio.sleep(began + fault.at - loop.time())
                tasks.create_task(self._strike(self._site.parts[fault.target], fault))

    async def _strike(self, part: Part, fault: Fault) -> None:
        if part.name in self._down or not await part.serves():
            return  # it was killed a moment ago, and is not back yet
        self.done.append(fault)
        if fault.kind == "stop":
            await self._stop(part, fault.seconds)
            return
        self.kills.append((asyncio.get_running_loop().time(), part.name))
        self._down.add(part.name)
        part.send(signal.SIGKILL)
        await part.ended(10)
        await asyncio.sleep(RESTART_SECONDS)
        self._down.discard(part.name)
        part.start()

    async def _stop(self, part: Part, seconds: float) -> None:
        starts = part.starts
        part.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            if part.starts == starts:  # else it was killed meanwhile
                part.send(signal.SIGCONT)
