"""An engine that does not answer ends its worker, so that whoever started it starts it again."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from backends.protocol import Cancel, Drain, Prefill, Tokens
from tests.engine.ending import WAYS
from tests.host.test_control import Peer, spec


@pytest.mark.parametrize("way", WAYS)
async def test_an_engine_that_does_not_answer_ends_its_worker(tmp_path: Path, way: str) -> None:
    path = str(tmp_path / "w.sock")
    command = (sys.executable, "-m", "tests.engine.ending", path, way)
    worker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(60):
            assert worker.stdout is not None
            while b"ready" not in await worker.stdout.readline():
                pass
            peer = await Peer(*await asyncio.open_unix_connection(path)).greet()
            peer.send(Prefill(spec=spec([1] * 40, max_tokens=4000), decode_here=True))
            await peer.hear(Tokens)
            if way != "silent":
                peer.send(Cancel(handle=1))
            if way == "lingering":
                peer.send(Drain())
            assert await peer.ended()
            assert await worker.wait() == os.EX_SOFTWARE
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
