"""What a sender in another process may still do to the pool, and when its blocks are free again."""

import asyncio
import contextlib
import signal
import socket
import sys
from asyncio.subprocess import PIPE

import msgspec
import numpy as np
import psutil
import pytest

from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS
from transfer.errors import PeerLost, PeerMisbehaved
from transfer.layout import Endpoint
from transfer.shared_memory import allocate
from transfer.shm import ShmReceiver, ShmSender, wire
from transfer.shm import process as process_module
from transfer.stage import SOURCE, TARGET, TARGET_BLOCKS, Pair, Stage

SECRET = "between workers"


@contextlib.asynccontextmanager
async def receiver_with(**more):
    settings = {"secret": SECRET, "stall_seconds": LONG_SECONDS, **more}
    pool = allocate(TARGET_BLOCKS * TARGET.block_bytes)
    async with ShmReceiver(TARGET, TARGET_BLOCKS, pool, **settings) as receiver:
        yield receiver, Stage(Pair(None, receiver, pool=pool))


@contextlib.asynccontextmanager
async def writer_process(stage, what, stall_seconds=LONG_SECONDS):
    """A process that writes the stage's landing."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.transfer.shm_writer", what, str(stall_seconds),
        stdin=PIPE, stdout=PIPE,
    )  # fmt: skip
    try:
        process.stdin.write(msgspec.msgpack.encode(stage.landing))
        process.stdin.close()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def said(process, word):
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await process.stdout.readline()).decode().strip() == word


async def stopped(process):
    await said(process, "stopping")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.005)


async def quiet(receiver, stage, seconds):
    """Whether the withdrawn landing becomes quiet within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await receiver.quiesce(stage.landing.id)
    except TimeoutError:
        return False
    return True


def outside(stage):
    """The bytes of every block that is not the landing's."""
    mask = np.ones(TARGET_BLOCKS, dtype=bool)
    mask[list(stage.landing.blocks)] = False
    return stage.pool.reshape(TARGET_BLOCKS, -1)[mask]


async def stays(stage):
    stage.pool[:] = 0xEE  # the next owner of these blocks
    await asyncio.sleep(0.2)
    return bool((stage.pool == 0xEE).all())


async def test_a_stopped_sender_keeps_its_blocks_until_it_goes_on_and_writes_nowhere_else():
    async with receiver_with() as (receiver, stage), writer_process(stage, "stop") as writer:
        await stopped(writer)
        receiver.withdraw(stage.landing.id)
        assert not await quiet(receiver, stage, 0.5)
        before, others = stage.pool.copy(), outside(stage).copy()
        writer.send_signal(signal.SIGCONT)
        assert await quiet(receiver, stage, PATIENCE_SECONDS)
        assert (stage.pool != before).any(), "there was no late write to be seen"
        assert (outside(stage) == others).all()
        assert await stays(stage)
        await said(writer, "LandingGone")
        assert not stage.failures


async def test_a_stopped_sender_that_is_killed_gives_its_blocks_back_at_once():
    async with receiver_with() as (receiver, stage), writer_process(stage, "stop") as writer:
        await stopped(writer)
        receiver.withdraw(stage.landing.id)
        assert not await quiet(receiver, stage, 0.2)
        writer.kill()
        assert await quiet(receiver, stage, PATIENCE_SECONDS)
        assert await stays(stage)


async def test_a_killed_sender_fails_its_landing_which_is_quiet_at_once():
    async with receiver_with() as (receiver, stage), writer_process(stage, "stop") as writer:
        await stopped(writer)
        writer.kill()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await stage.told.wait()
        assert isinstance(stage.failures[0], PeerLost)
        assert await quiet(receiver, stage, PATIENCE_SECONDS)


async def test_a_sender_that_was_given_up_while_it_stood_still_is_heard_when_it_goes_on():
    async with (
        receiver_with(stall_seconds=2.0) as (receiver, stage),
        writer_process(stage, "stop") as writer,
    ):
        await stopped(writer)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await stage.told.wait()  # silent for too long: the connection is closed
        assert isinstance(stage.failures[0], PeerLost)
        assert not await quiet(receiver, stage, 0.5)
        before, others = stage.pool.copy(), outside(stage).copy()
        writer.send_signal(signal.SIGCONT)
        assert await quiet(receiver, stage, PATIENCE_SECONDS)
        assert (stage.pool != before).any(), "there was no late write to be seen"
        assert (outside(stage) == others).all()
        assert await stays(stage)


async def test_a_sender_that_closes_but_lives_on_keeps_its_blocks_until_it_has_stopped_writing():
    async with receiver_with() as (receiver, stage), writer_process(stage, "close") as writer:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await stage.told.wait()
        assert await quiet(receiver, stage, PATIENCE_SECONDS)
        assert await stays(stage)
        assert writer.returncode is None


async def test_an_endpoint_on_another_host_is_refused_at_once():
    async with receiver_with() as (receiver, _stage), ShmSender(secret=SECRET) as sender:
        host, _, path = receiver.endpoint.address.partition(":")
        elsewhere = Endpoint("shm", f"{host[::-1]}:{path}")
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(PeerLost, match="it is on another host"):
                await sender.connect(elsewhere, SOURCE, TARGET)


@pytest.mark.parametrize("address", ["", "x", "host:", "host:relative", "/path"])
async def test_an_address_that_is_none_is_refused(address):
    async with ShmSender() as sender:
        with pytest.raises(PeerLost, match="is not host:path"):
            await sender.connect(Endpoint("shm", address), SOURCE, TARGET)


async def test_another_user_is_refused_at_either_end(monkeypatch):
    async with receiver_with() as (receiver, _stage), ShmSender(secret=SECRET) as sender:
        monkeypatch.setattr(process_module.os, "geteuid", lambda: 12345)
        with pytest.raises(PeerLost, match="runs as user"):
            await sender.connect(receiver.endpoint, SOURCE, TARGET)


async def test_a_wrong_secret_is_refused_and_nothing_is_handed_out():
    async with receiver_with() as (receiver, _stage), ShmSender(secret="another") as sender:
        with pytest.raises(PeerLost, match="secret"):
            await sender.connect(receiver.endpoint, SOURCE, TARGET)
        assert not receiver.intake._guests


def test_a_pool_that_cannot_be_shared_is_refused():
    pool = np.zeros(TARGET_BLOCKS * TARGET.block_bytes, np.uint8)
    with pytest.raises(ValueError, match="cannot be shared"):
        ShmReceiver(TARGET, TARGET_BLOCKS, pool)


def test_more_regions_than_a_process_may_map_are_neither_offered_nor_taken():
    count = wire.MAX_REGIONS + 1
    layout = msgspec.structs.replace(TARGET, axes="block | layer kv head token dim")
    regions = list(allocate(count * layout.block_bytes).reshape(count, -1))
    with pytest.raises(ValueError, match="4097 regions"):
        ShmReceiver(layout, count, regions)
    piece = wire.Piece(0, 0, 1)
    blob = msgspec.msgpack.encode(wire.Invitation((piece,) * count, piece, piece))
    with pytest.raises(PeerMisbehaved):
        wire.invitation(blob)


async def test_a_landing_in_another_pool_is_refused():
    async with receiver_with() as (receiver, stage):
        with pytest.raises(ValueError, match="another pool"):
            Stage(Pair(None, receiver, pool=allocate(stage.pool.nbytes)), 2)


async def test_a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not(tmp_path):
    path = tmp_path / "kv.sock"
    tmp_path.chmod(0o700)
    async with receiver_with(socket_path=path) as (receiver, _):
        assert receiver.endpoint.address.endswith(str(path))
        with pytest.raises(OSError, match="somebody else listens"):
            async with receiver_with(socket_path=path):
                pass
    assert not path.exists()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    async with receiver_with(socket_path=path):
        pass
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="0700"):
        async with receiver_with(socket_path=path):
            pass
