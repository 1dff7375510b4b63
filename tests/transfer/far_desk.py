"""One end of a handoff here, the other in a process of its own (`far.py`)."""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import msgspec
from far import LAYOUT, TOKENS, landing_at, source

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import whole
from transfer.layout import Landing

ROOT = Path(__file__).parents[2]
STALL_SECONDS = 5.0


class Far:
    """The process at the other end."""

    def __init__(self, process):
        self._process = process

    def say(self, *words):
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")

    async def hear(self):
        async with asyncio.timeout(PATIENCE_SECONDS):
            line = await self._process.stdout.readline()
        assert line, "it ended"
        return line.decode().strip()

    def signal(self, number):
        self._process.send_signal(number)

    async def expect(self):
        self.say("expect")
        while (said := await self.hear()).split()[0] in ("claimed", "arrived", "failed"):
            pass
        return msgspec.msgpack.decode(bytes.fromhex(said), type=Landing)

    async def starve(self, slack_bytes):
        self.say("starve", slack_bytes)
        assert await self.hear() == "starved"


@contextlib.asynccontextmanager
async def far(transport):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("far.py")),
        transport,
        str(STALL_SECONDS),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        one = Far(process)
        assert await one.hear() == "ready"
        yield one
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Owner:
    """Expects landings in one pool, and remembers how they ended."""

    def __init__(self, receiver, pool):
        self.pool = pool
        self.receiver = receiver
        self.given = 0
        self.ends = asyncio.Queue()

    def expect(self):
        self.given += 1
        landing = landing_at(self.receiver.endpoint, self.given)
        self.receiver.expect(
            landing,
            self.pool,
            touched=lambda: None,
            arrived=lambda _: self.ends.put_nowait("arrived") or b"",
            failed=lambda error: self.ends.put_nowait(type(error)),
        )
        return landing, msgspec.msgpack.encode(landing).hex()

    async def end(self):
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.ends.get()

    async def quiet(self, landing, seconds):
        """The landing is quiet in time, and stays so."""
        self.receiver.withdraw(landing.id)
        async with asyncio.timeout(seconds):
            await self.receiver.quiesce(landing.id)
        self.pool[:] = 0xEE

    def is_unharmed(self):
        return bool((self.pool == 0xEE).all())


async def hand_over(sender, landing):
    writer = await sender.open(landing, source())
    try:
        for part in whole(LAYOUT.layers, TOKENS):
            await writer.write(part)
        await writer.commit(b"", PATIENCE_SECONDS)
    finally:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await writer.abort()


async def finish(writer):
    for part in whole(LAYOUT.layers, TOKENS)[1:]:
        await writer.write(part)
    await writer.commit(b"", PATIENCE_SECONDS)


def arrived(owner):
    return bool((owner.pool == source().pool).all())
