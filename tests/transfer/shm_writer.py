"""A sender in a process of its own, for `test_shm_processes.py`: writes one landing and is stopped.

Reads a landing from standard input, writes it, and does to itself what its argument says before
the second frame is moved: `stop` (SIGSTOP), `close` (the sender, while the process goes on).
"""

import asyncio
import signal
import sys
import threading
import time

import msgspec
import numpy as np

from tests.support.patience import LONG_SECONDS
from transfer.contract import Source, whole
from transfer.errors import TransferError
from transfer.layout import Landing
from transfer.shm import ShmSender
from transfer.stage import SOURCE, SOURCE_BLOCKS, TOKENS
from transfer.warming import warm_up


async def main(what, stall_seconds):
    warm_up()
    landing = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Landing)
    sender = ShmSender(secret="between workers", stall_seconds=stall_seconds)
    pool = np.random.default_rng(1).standard_normal(SOURCE_BLOCKS * SOURCE.block_bytes // 4)
    source = Source(SOURCE, pool.astype(np.float32), SOURCE_BLOCKS, (5, 6, 1, 3), TOKENS)
    loop, frames = asyncio.get_running_loop(), 0

    def tamper(_, frame):
        nonlocal frames
        frames += 1
        if frames == 2 and what == "stop":
            print("stopping", flush=True)
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif frames == 2 and what == "close":
            asyncio.run_coroutine_threadsafe(sender.close(), loop)
            time.sleep(0.3)  # it is known that the connection is lost, and still this moves
        return frame

    sender.tamper = tamper
    writer = await sender.open(landing, source)
    try:
        for part in whole(SOURCE.layers, TOKENS):
            await writer.write(part)
        await writer.commit(b"note", LONG_SECONDS)
        print("committed", flush=True)
    except TransferError as error:
        print(type(error).__name__, flush=True)
    await writer.abort()
    await asyncio.sleep(3600)


asyncio.run(main(sys.argv[1], float(sys.argv[2])))
