"""What a TCP sender has to bear beyond what every transport promises."""

import asyncio
import contextlib
import hashlib
import hmac
import operator
import os
import socket

import msgspec
import numpy as np
import pytest
from tcp_desk import EVERYTHING, WIDE, Owner, Stranger, landing_at, wide_source

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import KVSlice, Source, whole
from transfer.errors import LandingGone, LayoutMismatch, PeerLost
from transfer.layout import Endpoint
from transfer.session import wire as session
from transfer.stage import SOURCE, TARGET, eventually
from transfer.tcp import TcpReceiver, TcpSender, wire


@contextlib.asynccontextmanager
async def fake(behave):
    """A receiver that does as `behave(reader, writer)` says, and its endpoint."""
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await behave(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    try:
        yield wire.address(*server.sockets[0].getsockname()[:2])
    finally:
        server.close()
        for writer in connections:
            writer.transport.abort()
        await asyncio.sleep(0)


async def take(reader):
    [size] = session.PREFIX.unpack(await reader.readexactly(session.PREFIX.size))
    return EVERYTHING.decode(await reader.readexactly(size))


def welcoming(after, *, secret=b""):
    """Greet as a receiver does; what a session says then is for `after`, a data connection idle."""

    async def behave(reader, writer):
        said = hashlib.sha256(b"baton session")
        first = await take(reader)
        if isinstance(first, session.Join):
            await after(reader, writer, lane=True)
            return
        challenge = session.frame(session.Challenge(b"n"))
        writer.write(challenge)
        said.update(session.frame(first) + challenge)
        said.update(session.frame(await take(reader)))
        bare = session.Welcome(b"", b"token", digest=True, blob=b"")
        mac = hmac.digest(secret, b"receiver" + said.digest() + session.frame(bare), "sha256")
        writer.write(session.frame(msgspec.structs.replace(bare, mac=mac)))
        await after(reader, writer, lane=False)

    return behave


async def listen(reader, writer, *, lane):
    while lane:
        await reader.readexactly(1)
    while True:
        await take(reader)


async def read_nothing(reader, writer, *, lane):
    await asyncio.Event().wait()


async def answer_nonsense(reader, writer, *, lane):
    if not lane:
        assert isinstance(await take(reader), session.Open)
        writer.write(b"\xff" * 64)
    await asyncio.Event().wait()


async def say_nothing(reader, writer):
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("server", "client", "reason"),
    [("a", "b", "wrong shared secret"), ("a", "", "wrong shared secret"), ("", "b", "wrong")],
)
async def test_a_wrong_shared_secret_is_refused_with_the_reason(server, client, reason):
    async with TcpReceiver(WIDE, secret=server) as receiver, TcpSender(secret=client) as sender:
        with pytest.raises(PeerLost, match=reason):
            await sender.connect(receiver.endpoint, WIDE, WIDE)


async def test_another_layout_than_expected_is_refused_with_the_reason(receiver, sender):
    other = msgspec.structs.replace(TARGET, block_tokens=5)
    with pytest.raises(PeerLost, match="layout"):
        await sender.connect(receiver.endpoint, SOURCE, other)


async def test_another_version_is_refused_with_the_reason(receiver):
    async with Stranger(receiver) as stranger:
        stranger.say(session.Hello(session.VERSION + 1, TARGET.fingerprint, b""))
        denied = await stranger.hear()
        assert isinstance(denied, session.Denied)
        assert "version" in denied.reason


async def test_unlike_layouts_never_touch_the_network(sender):
    nowhere = Endpoint("tcp", "127.0.0.1:1")
    with pytest.raises(LayoutMismatch):
        await sender.connect(nowhere, msgspec.structs.replace(WIDE, model="other"), WIDE)


async def test_nobody_there_is_a_lost_peer(sender):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        where = wire.address(*unused.getsockname())
        with pytest.raises(PeerLost, match="cannot be reached"):
            await sender.connect(where, WIDE, WIDE)


async def test_a_peer_that_does_not_greet_is_lost_in_time():
    async with fake(say_nothing) as endpoint, TcpSender(connect_seconds=0.2) as sender:
        with pytest.raises(PeerLost, match="in time"):
            await sender.connect(endpoint, WIDE, WIDE)


async def test_a_peer_that_answers_nonsense_is_lost(sender):
    async with fake(welcoming(answer_nonsense)) as endpoint:
        writer = await sender.open(landing_at(endpoint), wide_source())
        with pytest.raises(PeerLost, match="misbehaved"):
            await writer.commit(b"", PATIENCE_SECONDS)
        await writer.abort()


async def test_a_commit_without_an_answer_ends_at_its_deadline(sender):
    async with fake(welcoming(listen)) as endpoint:
        writer = await sender.open(landing_at(endpoint), wide_source())
        with pytest.raises(TimeoutError):
            await writer.commit(b"", 0.05)
        await writer.abort()
        again = await sender.open(landing_at(endpoint), wide_source())
        await again.write(KVSlice(0, 0, 24))
        await again.abort()


async def test_a_peer_that_reads_nothing_holds_up_writers_and_is_then_lost():
    tokens = 16384
    blocks = tuple(range(WIDE.blocks_for(tokens)))
    pool = np.zeros(len(blocks) * WIDE.block_bytes, np.uint8)
    source = Source(WIDE, pool, len(blocks), blocks, tokens)
    slice_bytes = tokens * WIDE.token_bytes // WIDE.layers
    async with (
        fake(welcoming(read_nothing)) as endpoint,
        TcpSender(stall_seconds=1.0, backlog_bytes=slice_bytes) as sender,
    ):
        writer = await sender.open(landing_at(endpoint, tokens), source)
        await writer.write(KVSlice(0, 0, tokens))
        with pytest.raises(PeerLost):
            await writer.write(KVSlice(1, 0, tokens))
        await writer.abort()


async def test_a_writer_that_is_aborted_sends_nothing_of_what_is_queued(sender):
    heard, taken = [], []

    async def count(reader, writer, *, lane):
        while lane:
            taken.append(len(await reader.readexactly(1)))
        while not heard or not isinstance(heard[-1], session.Released):
            heard.append(await take(reader))

    async with fake(welcoming(count)) as endpoint:
        writer = await sender.open(landing_at(endpoint), wide_source())
        for _ in range(50):
            await writer.write(KVSlice(0, 0, 24))
        await writer.abort()
        await eventually(lambda: isinstance(heard[-1], session.Released), "no word of it")
        assert sum(taken) < 50 * 24 * WIDE.token_bytes // WIDE.layers
        with pytest.raises(LandingGone):
            await writer.write(KVSlice(0, 0, 24))


async def test_a_receiver_that_does_not_know_the_secret_is_not_trusted(sender):
    async with fake(welcoming(listen, secret=b"another")) as endpoint:
        with pytest.raises(PeerLost, match="secret"):
            await sender.connect(endpoint, WIDE, WIDE)


async def test_the_secret_is_never_said():
    heard = bytearray()

    async def listen_in(reader, writer):
        heard.extend(await reader.readexactly(20))
        writer.write(session.frame(session.Challenge(b"n" * 32)))
        while data := await reader.read(4096):
            heard.extend(data)

    async with fake(listen_in) as endpoint:
        async with TcpSender(secret="between workers", connect_seconds=1.0) as sender:
            with pytest.raises(PeerLost):
                await sender.connect(endpoint, WIDE, WIDE)
        await eventually(lambda: b"Proof" in heard, "it proved nothing")
    assert b"between workers" not in heard


async def test_a_receiver_that_falls_silent_is_lost():
    async with fake(welcoming(listen)) as endpoint, TcpSender(stall_seconds=1.0) as sender:
        writer = await sender.open(landing_at(endpoint), wide_source())
        with pytest.raises(PeerLost, match="nothing was heard"):
            await writer.commit(b"", PATIENCE_SECONDS)
        await writer.abort()


async def test_a_receiver_that_comes_back_is_met_again(sender):
    async with TcpReceiver(WIDE) as first:
        await sender.connect(first.endpoint, WIDE, WIDE)
        port = wire.host_and_port(first.endpoint)[1]
        owner = Owner(first)
        writer = await sender.open(owner.landing, wide_source())
        await writer.write(KVSlice(0, 0, 24))
        await eventually(lambda: owner.touches > 0, "the write was not begun")
    await eventually(lambda: bool(owner.failures), "the owner was not told")
    with pytest.raises(PeerLost):
        await writer.commit(b"", PATIENCE_SECONDS)
    await writer.abort()
    async with TcpReceiver(WIDE, port=port) as second:
        owner = Owner(second)
        writer = await sender.open(owner.landing, wide_source())
        for part in whole(WIDE.layers, 24):
            await writer.write(part)
        await writer.commit(b"", PATIENCE_SECONDS)
        assert len(owner.arrivals) == 1


async def test_a_pair_has_one_session_however_many_meet_at_once(receiver, sender):
    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(sender.connect(receiver.endpoint, SOURCE, TARGET))
    assert len(receiver._sessions) == 1


async def test_closing_leaves_no_thread_and_no_descriptor():
    def open_things():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    async with TcpReceiver(WIDE):
        pass
    before = open_things()
    for _ in range(3):
        async with TcpReceiver(WIDE) as receiver, TcpSender() as sender:
            owner = Owner(receiver)
            writer = await sender.open(owner.landing, wide_source())
            for part in whole(WIDE.layers, 24):
                await writer.write(part)
            await writer.commit(b"", PATIENCE_SECONDS)
    # Fewer threads are left where the first receiver's had not ended yet.
    await eventually(
        lambda: all(map(operator.le, open_things(), before)), f"{open_things()}, before {before}"
    )
