"""What TCP has to bear beyond what every transport promises."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap

import msgspec
import numpy as np
import pytest

from transfer.contract import KVSlice, Source, whole
from transfer.errors import LandingGone, LayoutMismatch, PeerLost, PeerMisbehaved
from transfer.layout import Endpoint, Epoch, KVLayout, Landing
from transfer.stage import SOURCE, TARGET, Pair, Stage, eventually
from transfer.tcp import TcpReceiver, TcpSender, wire

# Runs of 16 KiB, so that they are received in place.
WIDE = KVLayout(
    model="wide",
    weights="float32",
    layers=2,
    kv_heads=4,
    head_dim=64,
    dtype="float32",
    block_tokens=8,
    rope="half",
)


@pytest.fixture
async def receiver():
    async with TcpReceiver(TARGET, stall_seconds=5.0) as receiver:
        yield receiver


@pytest.fixture
async def sender():
    async with TcpSender(stall_seconds=5.0) as sender:
        yield sender


class Owner:
    """Expects a landing in WIDE and remembers what it is told."""

    def __init__(self, receiver, blocks=(3, 1, 0), tokens=24):
        self.pool = np.zeros(4 * WIDE.block_bytes, np.uint8)
        self.touches, self.arrivals, self.failures = 0, [], []
        self.landing = Landing(
            id="wide",
            epoch=Epoch(1, 1),
            secret=b"s" * 16,
            worker="decode",
            endpoints=(receiver.endpoint,),
            layout=WIDE,
            pool_blocks=4,
            blocks=blocks,
            tokens=tokens,
            lease_seconds=60.0,
        )
        receiver.expect(
            self.landing,
            self.pool,
            touched=self.touch,
            arrived=lambda it: self.arrivals.append(it) or b"",
            failed=self.failures.append,
        )

    def touch(self):
        self.touches += 1


class Stranger:
    """A client that speaks the protocol byte by byte."""

    def __init__(self, receiver):
        host, port = wire.host_and_port(receiver.endpoint)
        self._where = host, port
        self._layout = receiver.layout

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection(*self._where)
        return self

    async def __aexit__(self, *exit_):
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def greeted(self):
        self.say(wire.Hello(wire.VERSION, b"", self._layout.fingerprint))
        assert await self.hear() == wire.Welcome(wire.VERSION)
        return self

    def say(self, message, payload=0):
        self.writer.write(wire.frame(message, payload))

    async def hear(self):
        async with asyncio.timeout(5):
            size, payload = wire.PREFIX.unpack(await self.reader.readexactly(wire.PREFIX.size))
            assert payload == 0
            return wire.to_sender(await self.reader.readexactly(size))

    async def closed(self):
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                await self.reader.read()
        return True


def opening(landing, ticket=0):
    return wire.Open(ticket, landing.id, landing.epoch, landing.secret)


def runs(*pairs):
    offsets, lengths = zip(*pairs, strict=True)
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def wide_source(blocks=(1, 2, 0), tokens=24):
    pool = np.random.default_rng(5).integers(0, 256, 3 * WIDE.block_bytes, dtype=np.uint8)
    return Source(WIDE, pool, 3, blocks, tokens)


# ---- in place ------------------------------------------------------------------------------


async def test_long_runs_are_received_in_place(sender):
    async with TcpReceiver(WIDE) as receiver:
        owner, source = Owner(receiver), wide_source()
        writer = await sender.open(owner.landing, source)
        for part in whole(WIDE.layers, 24):
            await writer.write(part)
        receipt = await writer.commit(b"", 5.0)
        assert receipt.bytes == 24 * WIDE.token_bytes
        block = WIDE.block_bytes
        for here, there in zip(source.blocks, owner.landing.blocks, strict=True):
            ours = source.pool[here * block : (here + 1) * block]
            assert (owner.pool[there * block : (there + 1) * block] == ours).all()
        assert not owner.pool[2 * block : 3 * block].any()


async def test_handoffs_larger_than_the_socket_s_buffer_arrive_side_by_side(sender):
    tokens, blocks = 1024, tuple(range(128))
    random = np.random.default_rng(6)
    pool = random.integers(0, 256, 128 * WIDE.block_bytes, dtype=np.uint8)
    async with TcpReceiver(WIDE) as receiver:
        await sender.connect(receiver.endpoint, WIDE, WIDE)
        [connection] = sender._connections.values()
        connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)

        async def hand_over(name):
            landing = msgspec.structs.replace(
                landing_at(receiver.endpoint, tokens), id=name, blocks=blocks[::-1]
            )
            there = np.zeros_like(pool)
            receiver.expect(
                landing,
                there,
                touched=lambda: None,
                arrived=lambda it: it.note,
                failed=lambda _: None,
            )
            writer = await sender.open(landing, Source(WIDE, pool, 128, blocks, tokens))
            for part in whole(WIDE.layers, tokens):
                await writer.write(part)
            receipt = await writer.commit(name.encode(), 10.0)
            assert receipt.answer == name.encode()
            wanted = pool.reshape(128, -1)[::-1]
            assert (there.reshape(128, -1) == wanted).all()

        async with asyncio.TaskGroup() as group:
            for name in ("a", "b", "c"):
                group.create_task(hand_over(name))
        assert len(receiver.landings) == 0


@pytest.mark.parametrize("run_bytes", [16384, 1024], ids=["in place", "staged"])
async def test_the_rest_of_a_write_under_way_is_drained_after_a_withdrawal(run_bytes):
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        pieces = runs(*((at, run_bytes) for at in range(0, 32768, run_bytes)))
        stranger.say(opening(owner.landing))
        stranger.say(wire.write_message(0, *pieces), 32768)
        stranger.writer.write(b"\xaa" * 20000)
        await eventually(lambda: owner.touches == 1, "the write was not begun")
        if run_bytes == 16384:
            await eventually(lambda: owner.pool[19999] == 0xAA, "it was not received in place")
        receiver.withdraw("wide")
        await receiver.quiesce("wide")
        owner.pool[:] = 0xEE
        stranger.writer.write(b"\xaa" * 12768)
        gone = await stranger.hear()
        assert (gone.ticket, gone.outcome) == (0, "gone")
        stranger.say(wire.Abort(0))
        assert (await stranger.hear()).outcome == "aborted"
        assert (owner.pool == 0xEE).all()
        assert not owner.failures


# ---- what a receiver bears -----------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(8),
        struct.pack(">II", 0xFFFFFFFF, 0),
        struct.pack(">II", wire.MAX_STRANGER_BYTES + 1, 0),
        struct.pack(">II", 4, 0xFFFFFFFF) + b"\x00" * 4,
        struct.pack(">II", 4, 0) + b"\xc1\xc1\xc1\xc1",
        wire.frame(wire.Abort(0)),
        wire.frame(wire.Hello(wire.VERSION, b"", TARGET.fingerprint), 8),
    ],
)
async def test_nonsense_closes_its_connection_and_no_other(receiver, sender, nonsense):
    stage = Stage(Pair(sender, receiver))
    writer = await sender.open(stage.landing, stage.source)
    async with Stranger(receiver) as stranger:
        stranger.writer.write(nonsense)
        assert await stranger.closed()
    await stage.write_all(writer)
    await writer.commit(b"", 5.0)


def claims(message, payload=0):
    return message, payload


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        claims(wire.write_message(0, *runs((0, 64))), 65),
        claims(wire.write_message(0, *runs((0, 64))), 63),
        claims(wire.Write(0, b"", b""), 0),
        claims(wire.Write(0, bytes(7), bytes(4)), 4),
        claims(wire.Write(0, bytes(16), bytes(4)), 4),
        claims(wire.write_message(5, *runs((0, 64))), 64),
        claims(wire.write_message(0, *runs((0, 0))), 0),
        claims(wire.write_message(0, *runs((-64, 64))), 64),
        claims(wire.write_message(0, *runs((2 * WIDE.block_bytes - 1, 2))), 2),
        claims(wire.write_message(0, *runs((4 * WIDE.block_bytes - 1, 2))), 2),
        claims(wire.write_message(0, *runs((0, 64), (2 * WIDE.block_bytes, 64))), 128),
        claims(wire.Hello(wire.VERSION, b"", WIDE.fingerprint)),
        claims(wire.Open(0, "wide", Epoch(1, 1), b"")),
        claims(wire.Commit(9, b"", b"")),
    ],
)
async def test_a_sender_that_lies_is_cut_off_and_its_landing_freed(message, payload):
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        stranger.say(message, payload)
        stranger.writer.write(b"\xaa" * payload)
        assert await stranger.closed()
        assert [type(it) for it in owner.failures] == [PeerMisbehaved]
        assert not owner.pool.any()


async def test_runs_may_span_neighbouring_blocks_of_the_landing():
    async with TcpReceiver(WIDE) as receiver, Stranger(receiver) as stranger:
        await stranger.greeted()
        owner = Owner(receiver)
        stranger.say(opening(owner.landing))
        at = WIDE.block_bytes - 32  # from block 0 into block 1
        stranger.say(wire.write_message(0, *runs((at, 64))), 64)
        stranger.writer.write(b"\xaa" * 64)
        await eventually(lambda: bool((owner.pool[at : at + 64] == 0xAA).all()), "not written")
        assert owner.pool.sum() == 64 * 0xAA


async def test_a_connection_that_breaks_within_a_payload_fails_its_landings_once():
    async with TcpReceiver(WIDE) as receiver:
        owner = Owner(receiver)
        async with Stranger(receiver) as stranger:
            await stranger.greeted()
            stranger.say(opening(owner.landing))
            stranger.say(wire.write_message(0, *runs((0, 16384))), 16384)
            stranger.writer.write(b"\xaa" * 5000)
            await eventually(lambda: owner.touches == 1, "the write was not begun")
        await eventually(lambda: bool(owner.failures), "the owner was not told")
        assert [type(it) for it in owner.failures] == [PeerLost]
        assert len(receiver.landings) == 0


async def test_a_stranger_who_says_nothing_is_sent_away():
    async with TcpReceiver(WIDE, stall_seconds=0.05) as receiver, Stranger(receiver) as stranger:
        assert isinstance(await stranger.hear(), wire.Denied)
        assert await stranger.closed()


async def test_one_connection_too_many_is_denied():
    async with (
        TcpReceiver(WIDE, max_connections=1) as receiver,
        Stranger(receiver) as one,
        Stranger(receiver) as other,
    ):
        await one.greeted()
        assert await other.hear() == wire.Denied("too many connections")


async def test_a_receiver_on_every_address_must_say_its_name():
    with pytest.raises(ValueError, match=r"^advertise"):
        TcpReceiver(WIDE, host="0.0.0.0")
    async with TcpReceiver(WIDE, host="0.0.0.0", advertise="127.0.0.1") as receiver:
        assert receiver.endpoint.address.startswith("127.0.0.1:")


async def test_a_sender_that_is_killed_frees_its_landing():
    async with TcpReceiver(WIDE) as receiver:
        owner = Owner(receiver)
        script = f"""
            import asyncio, numpy, msgspec
            from transfer.contract import KVSlice, Source
            from transfer.layout import Landing
            from transfer.tcp import TcpSender
            landing = msgspec.json.decode({msgspec.json.encode(owner.landing)!r}, type=Landing)
            pool = numpy.ones(3 * landing.layout.block_bytes, numpy.uint8)
            async def main():
                async with TcpSender() as sender:
                    source = Source(landing.layout, pool, 3, (0, 1, 2), 24)
                    writer = await sender.open(landing, source)
                    await writer.write(KVSlice(0, 0, 24))
                    await asyncio.sleep(60)
            asyncio.run(main())
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            await eventually(lambda: owner.touches > 0, "the child wrote nothing")
            child.send_signal(signal.SIGKILL)
            await eventually(lambda: bool(owner.failures), "the owner was not told")
        finally:
            child.kill()
            child.wait()
        assert [type(it) for it in owner.failures] == [PeerLost]


# ---- what a sender bears -------------------------------------------------------------------


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
    size, payload = wire.PREFIX.unpack(await reader.readexactly(wire.PREFIX.size))
    message = wire.to_receiver(await reader.readexactly(size))
    while payload:
        payload -= len(await reader.read(min(payload, 65536)))
    return message


async def welcome(reader, writer):
    assert isinstance(await take(reader), wire.Hello)
    writer.write(wire.frame(wire.Welcome(wire.VERSION)))


async def welcome_and_listen(reader, writer):
    await welcome(reader, writer)
    while True:
        message = await take(reader)
        if isinstance(message, wire.Abort):
            writer.write(wire.frame(wire.Answer(message.ticket, "aborted")))


async def welcome_and_read_nothing(reader, writer):
    await welcome(reader, writer)
    await asyncio.Event().wait()


async def answer_nonsense(reader, writer):
    await welcome(reader, writer)
    assert isinstance(await take(reader), wire.Open)
    writer.write(b"\xff" * 64)
    await asyncio.Event().wait()


async def say_nothing(reader, writer):
    await asyncio.Event().wait()


def landing_at(endpoint, tokens=24):
    blocks = tuple(range(WIDE.blocks_for(tokens)))
    return Landing(
        id="fake",
        epoch=Epoch(1, 1),
        secret=b"",
        worker="decode",
        endpoints=(endpoint,),
        layout=WIDE,
        pool_blocks=len(blocks),
        blocks=blocks,
        tokens=tokens,
        lease_seconds=60.0,
    )


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
        stranger.say(wire.Hello(wire.VERSION + 1, b"", TARGET.fingerprint))
        denied = await stranger.hear()
        assert isinstance(denied, wire.Denied)
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
    async with fake(say_nothing) as endpoint, TcpSender(connect_seconds=0.05) as sender:
        with pytest.raises(PeerLost, match="in time"):
            await sender.connect(endpoint, WIDE, WIDE)


async def test_a_peer_that_answers_nonsense_is_lost(sender):
    async with fake(answer_nonsense) as endpoint:
        writer = await sender.open(landing_at(endpoint), wide_source())
        with pytest.raises(PeerLost, match="misbehaved"):
            await writer.commit(b"", 5.0)
        await writer.abort()


async def test_a_commit_without_an_answer_ends_at_its_deadline(sender):
    async with fake(welcome_and_listen) as endpoint:
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
        fake(welcome_and_read_nothing) as endpoint,
        TcpSender(stall_seconds=0.2, backlog_bytes=slice_bytes) as sender,
    ):
        writer = await sender.open(landing_at(endpoint, tokens), source)
        await writer.write(KVSlice(0, 0, tokens))
        with pytest.raises(PeerLost):
            await writer.write(KVSlice(1, 0, tokens))
        await writer.abort()


async def test_a_writer_that_is_aborted_sends_nothing_of_what_is_queued(sender):
    heard = []

    async def listen(reader, writer):
        await welcome(reader, writer)
        while True:
            heard.append(await take(reader))
            if isinstance(heard[-1], wire.Abort):
                writer.write(wire.frame(wire.Answer(0, "aborted")))

    async with fake(listen) as endpoint:
        writer = await sender.open(landing_at(endpoint), wide_source())
        for _ in range(50):
            await writer.write(KVSlice(0, 0, 24))
        await writer.abort()
        kinds = [type(it) for it in heard]
        assert kinds[-1] is wire.Abort
        assert kinds.count(wire.Write) < 50
        with pytest.raises(LandingGone):
            await writer.write(KVSlice(0, 0, 24))


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
        await writer.commit(b"", 5.0)
    await writer.abort()
    async with TcpReceiver(WIDE, port=port) as second:
        owner = Owner(second)
        writer = await sender.open(owner.landing, wide_source())
        for part in whole(WIDE.layers, 24):
            await writer.write(part)
        await writer.commit(b"", 5.0)
        assert len(owner.arrivals) == 1


async def test_a_pair_has_one_connection_however_many_meet_at_once(receiver, sender):
    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(sender.connect(receiver.endpoint, SOURCE, TARGET))
    assert len(receiver._connections) == 1


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
            await writer.commit(b"", 5.0)
    await eventually(lambda: open_things() == before, f"{open_things()}, before {before}")
