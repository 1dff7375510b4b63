"""The other worker, in a process of its own that a test may stop, kill or starve.

    python far.py tcp|shm|nixl STALL_SECONDS

It reads a command a line, and says in a line how each of them ended:

    expect        say a new landing, later that somebody writes to it, and how it ended
    hand HEX      write into this landing and commit
    half HEX      write the first half of the layers, then wait for `rest`
    rest          write the other half and commit
    loop HEX      write all layers again and again until that fails
    cut N         shut the N-th connection down, in the order in which they were made
    starve BYTES  let the process have so much more memory, and no more
    feed          lift that limit
"""

import asyncio
import contextlib
import os
import resource
import socket
import stat
import sys
from pathlib import Path

import msgspec
import structlog
from ends import receiver_of, sender_of
from far_handoff import BLOCKS, LAYOUT, POOL_BYTES, TOKENS, landing_at, say, source

from transfer.contract import whole
from transfer.layout import Landing
from transfer.shared_memory import allocate
from transfer.warming import warm_up

ANSWER_SECONDS = 30.0


async def hand_over(sender, landing, data, half=None):
    """Write all and commit; after half of it, wait for `half` if there is one."""
    writer = await sender.open(landing, data)
    try:
        for part in whole(LAYOUT.layers, TOKENS):
            if half is not None and part.layer == LAYOUT.layers // 2:
                say("half")
                await half.wait()
            await writer.write(part)
        await writer.commit(b"", ANSWER_SECONDS)
    finally:
        await writer.abort()
    return "landed"


async def loop(sender, landing, data):
    writer = await sender.open(landing, data)
    try:
        while True:
            for part in whole(LAYOUT.layers, TOKENS):
                await writer.write(part)
            say("round")
    finally:
        await writer.abort()


def cut(number):
    """Shut one of this process's connections down, without a word to whoever uses it."""
    found = []
    for name in sorted(map(int, os.listdir("/proc/self/fd"))):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(name).st_mode):
                continue
            one = socket.socket(fileno=os.dup(name))
            if one.family == socket.AF_INET:
                one.getpeername()  # one that listens has none
                found.append(one)
    found[number].shutdown(socket.SHUT_RDWR)


def starve(more):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def feed():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


async def told(work):
    """Say how `work` ended."""
    try:
        say(await work)
    except Exception as error:
        say(type(error).__name__)


async def main(transport, stall_seconds):
    warm_up()  # as a worker does: what is compiled or loaded while memory is short ends the process
    pool = allocate(POOL_BYTES)
    receiver = receiver_of(transport, LAYOUT, BLOCKS, pool, stall_seconds=stall_seconds)
    sender = sender_of(transport, stall_seconds=stall_seconds)
    data, half, given = source(), asyncio.Event(), 0
    async with receiver, sender, asyncio.TaskGroup() as group:
        say("ready")
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        while line := await lines.readline():
            what, *rest = line.decode().split()
            landing = None
            if what in ("hand", "half", "loop"):
                landing = msgspec.msgpack.decode(bytes.fromhex(rest[0]), type=Landing)
            match what:
                case "hand":
                    group.create_task(told(hand_over(sender, landing, data)))
                case "half":
                    half.clear()
                    group.create_task(told(hand_over(sender, landing, data, half)))
                case "rest":
                    half.set()
                case "loop":
                    group.create_task(told(loop(sender, landing, data)))
                case "expect":
                    given += 1
                    landing = landing_at(receiver.endpoint, given)
                    receiver.expect(
                        landing,
                        pool,
                        touched=lambda: None,
                        arrived=lambda _: say("arrived") or b"",
                        failed=lambda error: say("failed", type(error).__name__),
                        claimed=lambda: say("claimed"),
                    )
                    say(msgspec.msgpack.encode(landing).hex())
                case "cut":
                    cut(int(rest[0]))
                case "starve":
                    starve(int(rest[0]))
                    say("starved")
                case "feed":
                    feed()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
