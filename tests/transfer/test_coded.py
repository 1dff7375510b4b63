"""Codes are handed over, proven where they land, and decoded from there alone."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from tests.support.patience import PATIENCE_SECONDS
from transfer import coded
from transfer.coded import CodedSender, codec_of, decode, named
from transfer.coding import CODECS, coded_layout
from transfer.contract import KVSlice, Probe, Source
from transfer.convert import Conversion
from transfer.errors import DigestMismatch, LandingGone, LayoutMismatch, PeerMisbehaved
from transfer.layout import Epoch, KVLayout, Landing
from transfer.shared_memory import allocate
from transfer.shm import ShmReceiver, ShmSender
from transfer.tcp import TcpReceiver, TcpSender

SOURCE = KVLayout(
    model="m", weights="bfloat16", layers=3, kv_heads=2, head_dim=16, dtype="float32",
    block_tokens=8, rope="half", axes="layer kv block token head dim",
)  # fmt: skip
TARGET = msgspec.structs.replace(SOURCE, block_tokens=4, axes="block layer kv head token dim")
TOKENS = 53
PADDED = 64
STAGED_BLOCKS, SOURCE_BLOCKS, TARGET_BLOCKS = 6, 10, 20
STAGED = (4, 1, 5, 0)


class Desk:
    """One handoff of codes: a source, a coded pool that it lands in, a pool to decode into."""

    def __init__(self, receiver, sender, staging, codec):
        self.receiver, self.sender, self.staging, self.codec = receiver, sender, staging, codec
        random = np.random.default_rng(4)
        self.numbers = random.standard_normal(SOURCE_BLOCKS * SOURCE.block_bytes // 4, np.float32)
        self.source = Source(SOURCE, self.numbers, SOURCE_BLOCKS, (5, 1, 2, 9, 3, 0, 7), TOKENS)
        self.before = random.integers(0, 255, len(staging), np.uint8)
        staging[:] = self.before
        self.layout = coded_layout(TARGET, codec)
        self.landing = Landing(
            id="l", epoch=Epoch(1, 1), secret=b"s" * 16, worker="d",
            endpoints=(receiver.endpoint,), layout=self.layout, pool_blocks=STAGED_BLOCKS,
            blocks=STAGED, tokens=PADDED, lease_seconds=60.0,
        )  # fmt: skip
        self.arrivals, self.failures = [], []
        receiver.expect(
            self.landing, staging, touched=lambda: None, arrived=self.arrived,
            failed=self.failures.append,
        )  # fmt: skip

    def arrived(self, arrival):
        self.arrivals.append(arrival)
        return b""

    async def hand_over(self):
        await self.sender.connect(self.receiver.endpoint, SOURCE, TARGET)
        writer = await self.sender.open(self.landing, self.source)
        try:
            for start, end in ((0, 20), (20, 37), (37, TOKENS)):
                await writer.write(KVSlice(0, start, end, 2))
                await writer.write(KVSlice(2, start, end))
            return await writer.commit(b"note", PATIENCE_SECONDS)
        finally:
            await writer.abort()

    def decoded(self):
        """The prefix as [token, layer, kv, head, dim], as it is decoded and as it was."""
        pool = np.zeros(TARGET_BLOCKS * TARGET.block_bytes // 4, np.float32)
        blocks = tuple(range(2, 2 + TARGET.blocks_for(TOKENS)))[::-1]
        codes = Source(self.layout, self.staging, STAGED_BLOCKS, STAGED, PADDED)
        decode(self.codec, codes, TOKENS, TARGET, pool, TARGET_BLOCKS, blocks)
        ours = prefix(SOURCE, self.numbers, SOURCE_BLOCKS, self.source.blocks)
        return prefix(TARGET, pool, TARGET_BLOCKS, blocks), ours


def prefix(layout, pool, pool_blocks, blocks):
    words = layout.order
    view = pool.reshape(tuple(layout.sizes(pool_blocks).values()))
    order = ("block", "token", "layer", "kv", "head", "dim")
    view = view.transpose([words.index(it) for it in order])
    size = layout.block_tokens
    return np.array([view[blocks[it // size], it % size] for it in range(TOKENS)])


@contextlib.asynccontextmanager
async def desk(transport, codec="int8", sender=None):
    layout = coded_layout(TARGET, codec)
    staging = allocate(STAGED_BLOCKS * layout.block_bytes)
    if transport == "tcp":
        receiver, inner = TcpReceiver(layout), TcpSender()
    else:
        receiver, inner = ShmReceiver(layout, STAGED_BLOCKS, staging), ShmSender()
    receiver.codes = named(transport, codec), 1e9
    with ThreadPoolExecutor(1) as threads:
        async with receiver, inner:
            outer = CodedSender(sender(inner) if sender else inner, codec, threads)
            yield Desk(receiver, outer, staging, codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_a_prefix_arrives_as_codes_and_is_decoded(transport, codec):
    async with desk(transport, codec) as made:
        receipt = await made.hand_over()
        assert receipt.bytes == PADDED * made.layout.token_bytes < TOKENS * TARGET.token_bytes / 2
        assert [it.note for it in made.arrivals] == [b"note"]
        found, wanted = made.decoded()
        assert 0 < np.abs(found - wanted).max() < (0.03 if codec == "int8" else 0.3)
        untouched = [it for it in range(STAGED_BLOCKS) if it not in STAGED]
        blocks = made.staging.reshape(STAGED_BLOCKS, -1)[untouched]
        assert (blocks == made.before.reshape(STAGED_BLOCKS, -1)[untouched]).all()


def swapped_scales(frame):
    """The scales of two neighbouring vectors, each in the place of the other."""
    size = SOURCE.head_dim + 2
    data = frame.data
    one, other = data[size - 2 : size].copy(), data[2 * size - 2 : 2 * size].copy()
    assert (one != other).any()
    data[size - 2 : size], data[2 * size - 2 : 2 * size] = other, one
    return frame


def stale_codes(frame):
    """The first run is not written: what lies there is of an earlier handoff."""
    first = int(frame.lengths[0])
    return msgspec.structs.replace(
        frame, offsets=frame.offsets[1:], lengths=frame.lengths[1:], data=frame.data[first:]
    )


@pytest.mark.parametrize("harm", [swapped_scales, stale_codes])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_codes_or_scales_that_are_not_those_that_were_encoded_are_refused(transport, harm):
    async with desk(transport) as made:
        harmed = []

        def tamper(_landing, frame):
            if harmed or (len(frame.offsets) < 2 and harm is stale_codes):
                return frame
            harmed.append(frame.layer)
            return harm(frame)

        made.sender._inner.tamper = tamper
        with pytest.raises(DigestMismatch):
            await made.hand_over()
        assert harmed
        assert not made.arrivals
        assert [type(it) for it in made.failures] == [DigestMismatch]


async def test_an_abort_waits_for_what_reads_the_source():
    async with desk("tcp") as made:
        await made.sender.connect(made.receiver.endpoint, SOURCE, TARGET)
        writer = await made.sender.open(made.landing, made.source)
        begun, go_on = threading.Event(), threading.Event()
        encode = writer._encoder.encode

        def slowly(part):
            begun.set()
            assert go_on.wait(PATIENCE_SECONDS)
            encode(part)

        writer._encoder.encode = slowly
        writing = asyncio.ensure_future(writer.write(KVSlice(0, 0, TOKENS, 3)))
        await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
        writing.cancel()
        await asyncio.wait([writing])
        aborting = asyncio.ensure_future(writer.abort())
        await asyncio.sleep(0.05)
        assert not aborting.done()
        go_on.set()
        await asyncio.wait_for(aborting, PATIENCE_SECONDS)
        assert not made.arrivals


async def test_a_piece_of_a_slice_is_sent_while_the_next_one_is_encoded(monkeypatch):
    monkeypatch.setattr(coded, "PIECE_BYTES", 1)
    async with desk("tcp") as made:
        await made.sender.connect(made.receiver.endpoint, SOURCE, TARGET)
        writer = await made.sender.open(made.landing, made.source)
        encode, send = writer._encoder.encode, writer._inner.write
        begun = [threading.Event() for _ in range(3)]
        sent = []

        def noting(part):
            begun[part.layer].set()
            encode(part)

        async def waiting(part):
            if part.layer < 2:
                assert await asyncio.to_thread(begun[part.layer + 1].wait, PATIENCE_SECONDS)
            sent.append((part.layer, part.layers))
            await send(part)

        writer._encoder.encode, writer._inner.write = noting, waiting
        await writer.write(KVSlice(0, 0, TOKENS, 3))
        await writer.commit(b"note", PATIENCE_SECONDS)
        await writer.abort()
        assert sent == [(0, 1), (1, 1), (2, 1)]
        found, right = made.decoded()
        assert np.abs(found - right).max() < 0.1


def test_how_fast_codes_are_made_counts_both_layouts(monkeypatch):
    seen = []
    monkeypatch.setattr(coded, "Conversion", lambda *it: seen.append(it) or Conversion(*it))
    coded.encodes_per_second.cache_clear()
    coded.decodes_per_second.cache_clear()
    assert coded.encodes_per_second("int8", SOURCE, TARGET) > 0
    assert {it[0].source for it in seen} == {SOURCE}
    seen.clear()
    assert coded.decodes_per_second("int8", TARGET) > 0
    assert {it[0].target for it in seen} == {TARGET}


async def test_buffers_of_ended_handoffs_are_used_again():
    async with desk("tcp") as made:
        await made.hand_over()
        (kept,) = made.sender._buffers
        assert made.sender._take(100) is kept


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layout": TARGET}, LayoutMismatch),
        ({"layout": coded_layout(TARGET, "float8_e4m3")}, LayoutMismatch),
        ({"layout": msgspec.structs.replace(coded_layout(TARGET, "int8"), layers=2)},
         LayoutMismatch),
        ({"layout": msgspec.structs.replace(coded_layout(TARGET, "int8"), head_dim=17)},
         PeerMisbehaved),
        ({"tokens": TOKENS}, PeerMisbehaved),
        ({"epoch": Epoch(2, 2)}, LandingGone),
    ],
)  # fmt: skip
async def test_a_landing_for_something_else_gets_no_codes(change, error):
    async with desk("tcp") as made:
        made.landing = msgspec.structs.replace(made.landing, **change)
        with pytest.raises(error):
            await made.hand_over()
        assert not made.arrivals


class Slow:
    """A sender over a link of so many bytes a second."""

    def __init__(self, inner, rate):
        self._inner, self._rate = inner, rate

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def probe(self, endpoint):
        return Probe(self._rate, 1e-3)


@pytest.mark.parametrize(("rate", "worth"), [(1e6, True), (1e12, False)])
async def test_codes_are_the_faster_way_where_the_link_is_slow_and_only_there(rate, worth):
    async with desk("tcp", sender=lambda inner: Slow(inner, rate)) as made:
        line = await made.sender.connect(made.receiver.endpoint, SOURCE, TARGET)
        assert "LOSSY int8 codes, 28% of the bytes" in line
        probe = await made.sender.probe(made.receiver.endpoint)
        assert (probe.bytes_per_second > rate) == worth
        assert "decodes 4.0 GB/s" in probe.note


def test_a_transport_with_codes_has_a_name_of_its_own():
    assert codec_of(named("tcp", "int8")) == "int8"
    assert codec_of("tcp") is codec_of("tcp+zip") is None
