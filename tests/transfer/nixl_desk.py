"""One end of a handoff over NIXL here, the other in a process of its own (`nixl_far.py`)."""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
from far_handoff import BLOCKS, LAYOUT, landing_at, source
from nixl_far import RUN_BYTES, write_all

from transfer.layout import Landing
from transfer.nixl import NixlReceiver, NixlSender

FAR = Path(__file__).with_name("nixl_far.py")
STALL_SECONDS = 1.5
SOON_SECONDS = 10.0
"""Long before UCX notices anything; with room for a busy machine."""


class Far:
    """The process of `nixl_far.py`."""

    def __init__(self, process):
        self.process = process

    def tell(self, *words):
        self.process.stdin.write(" ".join(words).encode() + b"\n")

    async def hear(self):
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().split()

    def signal(self, number):
        os.kill(self.process.pid, number)


@contextlib.asynccontextmanager
async def far(*arguments, stall_seconds=STALL_SECONDS, **environment):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        FAR,
        arguments[0],
        str(stall_seconds),
        *arguments[1:],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        yield Far(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Owner:
    """Expects one landing after the other, and remembers what it is told."""

    def __init__(self, receiver):
        self.receiver = receiver
        self.pool = np.zeros(BLOCKS * LAYOUT.block_bytes, np.uint8)
        self.failures, self.arrivals = [], []
        self.count = 0

    def expect(self):
        self.count += 1
        self.landing = landing_at(self.receiver.endpoint, self.count)
        self.receiver.expect(
            self.landing,
            self.pool,
            touched=lambda: None,
            arrived=lambda it: self.arrivals.append(it) or b"",
            failed=self.failures.append,
        )
        return msgspec.msgpack.encode(self.landing).hex()

    async def quiet(self, seconds=10.0):
        self.receiver.withdraw(self.landing.id)
        async with asyncio.timeout(seconds):
            await self.receiver.quiesce(self.landing.id)

    async def stays_as_it_is(self, seconds=0.3):
        self.pool[:] = 0xEE  # the next owner of these blocks
        await asyncio.sleep(seconds)
        return bool((self.pool == 0xEE).all())


@contextlib.asynccontextmanager
async def written_to(*arguments, stall_seconds=STALL_SECONDS, **environment):
    """A receiver here, and a sender elsewhere that is writing into its landing."""
    async with NixlReceiver(LAYOUT, stall_seconds=stall_seconds) as receiver:
        owner = Owner(receiver)
        async with far("send", *arguments, stall_seconds=stall_seconds, **environment) as sender:
            sender.tell("write", owner.expect())
            assert await sender.hear() == ["written"]  # or queued, rather
            async with asyncio.timeout(60):
                while not owner.pool[:RUN_BYTES].any():
                    await asyncio.sleep(0.01)
            yield owner, sender


@contextlib.asynccontextmanager
async def writing_to(stall_seconds=STALL_SECONDS, **environment):
    """A receiver elsewhere, and a writer here that is writing into its landing."""
    async with (
        far("receive", stall_seconds=stall_seconds, **environment) as receiver,
        NixlSender(stall_seconds=stall_seconds, connect_seconds=60) as sender,
    ):
        [landing] = await receiver.hear()
        landing = msgspec.msgpack.decode(bytes.fromhex(landing), type=Landing)
        writer = await sender.open(landing, source())
        await write_all(writer)
        yield receiver, writer


async def write_until_it_fails(writer):
    async with asyncio.timeout(60):
        while True:
            await write_all(writer)
