"""The other worker, in a process of its own that a test may stop or kill.

    python nixl_far.py send     reads landings from standard input, and writes into each of them
    python nixl_far.py receive  expects one landing, and says where

What it has to say stands in lines on standard output.
"""

import asyncio
import sys

import msgspec
import numpy as np
from far_handoff import BLOCKS, LAYOUT, TOKENS, landing_at, say, source

from transfer.contract import whole
from transfer.errors import TransferError
from transfer.layout import Landing
from transfer.nixl import NixlReceiver, NixlSender
from transfer.nixl.wire import Process

RUN_BYTES = 64 << 10


async def send(stall_seconds, foreign):
    """Write into each landing again and again, or once and commit where it says so."""
    process = msgspec.structs.replace(Process.here(), space="elsewhere") if foreign else None
    data = source()
    async with NixlSender(
        stall_seconds=stall_seconds, connect_seconds=60, process=process
    ) as sender:
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, landing = line.split()
            landing = msgspec.msgpack.decode(bytes.fromhex(landing), type=Landing)
            writer = await sender.open(landing, data)
            try:
                await write_all(writer)
                say("written")
                if what == "commit":
                    await writer.commit(b"", 60)
                    say("landed")
                while what == "write":
                    await write_all(writer)
            except TransferError as error:
                say("failed", type(error).__name__)
            await writer.abort()
            say("aborted")


async def write_all(writer):
    for part in whole(LAYOUT.layers, TOKENS):
        await writer.write(part)


async def receive(stall_seconds):
    pool = np.zeros(BLOCKS * LAYOUT.block_bytes, np.uint8)
    async with NixlReceiver(LAYOUT, stall_seconds=stall_seconds) as receiver:
        landing = landing_at(receiver.endpoint)
        over = asyncio.Event()

        def failed(error):
            say("failed", type(error).__name__)
            over.set()

        def arrived(_):
            say("arrived", bool((pool == source().pool).all()))
            return b""

        receiver.expect(landing, pool, touched=lambda: None, arrived=arrived, failed=failed)
        say(msgspec.msgpack.encode(landing).hex())
        await over.wait()
        receiver.withdraw(landing.id)
        await receiver.quiesce(landing.id)
        say("quiet")
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    role, stall = sys.argv[1], float(sys.argv[2])
    asyncio.run(receive(stall) if role == "receive" else send(stall, sys.argv[3:] == ["foreign"]))
