"""Whatever bytes arrive, a parser of the data plane returns or raises `PeerMisbehaved`."""

import contextlib
import socket
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.garbage import LIES, garbage
from transfer.contract import KVSlice, Source
from transfer.convert import Conversion
from transfer.errors import LayoutMismatch, PeerMisbehaved
from transfer.landings import Landings
from transfer.layout import Epoch, Landing, Part, Shard
from transfer.nixl import wire as nixl
from transfer.plan import plan
from transfer.session import wire as session
from transfer.session.greeting import Talk
from transfer.sharded import pieces
from transfer.shm import wire as shm
from transfer.stage import SOURCE, SOURCE_BLOCKS, TARGET, TARGET_BLOCKS, TOKENS
from transfer.tcp import wire
from transfer.tcp.arrivals import Arrivals

MESSAGES = [
    session.Hello(session.VERSION, TARGET.fingerprint, b"n" * 32),
    session.Challenge(b"n" * 32),
    session.Proof(b"m" * 32, b"blob"),
    session.Welcome(b"m" * 32, b"t" * 32, True, b"blob"),
    session.Denied("no"),
    session.Join(b"t" * 32),
    session.Open(0, "landing", Epoch(1, 1), b"s" * 16, False),
    session.Granted(0),
    session.Touch(0),
    session.Commit(0, b"d" * 16, b"s" * 16, b"proof", b"note"),
    session.Released(0, False),
    session.Answer(0, "landed", "fine", 0.1, 5, b"answer"),
    session.Echo(1),
    session.Alive(),
]
BODIES = [session.frame(message)[session.PREFIX.size :] for message in MESSAGES]
LANDING = Landing(
    id="landing",
    epoch=Epoch(7, 1),
    secret=b"s" * 16,
    worker="decode",
    endpoints=(),
    layout=TARGET,
    pool_blocks=TARGET_BLOCKS,
    blocks=(9, 2, 3, 4, 14, 0),
    tokens=TOKENS,
    lease_seconds=60.0,
)


@pytest.mark.parametrize("parser", [session.greeting, session.to_receiver, session.to_sender])
@given(body=garbage(BODIES))
@example(body=b"\x93\xa5Touch\x00" + b"\x91" * 200000)
@example(body=b"\x96\xa4Open\x00\xa1\xff\x92\x00\x00\xa0\xc2")
def test_a_message_is_read_or_refused(parser: Callable[[bytes], Any], body: bytes) -> None:
    with contextlib.suppress(PeerMisbehaved):
        assert isinstance(parser(body), session.Message)


@pytest.mark.parametrize("lie", LIES)
def test_no_memory_is_taken_for_a_length_that_is_only_claimed(lie: bytes) -> None:
    tracemalloc.start()
    for parser in (session.greeting, session.to_receiver, session.to_sender):
        for body in BODIES:
            for at in range(len(body)):
                with contextlib.suppress(PeerMisbehaved):
                    parser(body[:at] + lie + body[at + 1 :])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@given(data=garbage(list(map(session.frame, MESSAGES[:6]))))
def test_a_greeting_is_heard_or_refused_within_its_bounds(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        talk = Talk(ours, 5.0)
        with contextlib.suppress(PeerMisbehaved, ConnectionResetError):
            while True:
                assert isinstance(talk.hear_any(), session.Message)


@given(size=st.one_of(st.just(0), st.integers(session.MAX_STRANGER_BYTES + 1, 2**32 - 1)))
def test_a_greeting_of_a_claimed_length_beyond_the_bounds_is_refused_unread(size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(session.PREFIX.pack(size))
        with pytest.raises(PeerMisbehaved):
            Talk(ours, 5.0).hear_any()


HEADS = st.one_of(
    st.binary(min_size=wire.HEAD.size, max_size=wire.HEAD.size),
    st.builds(
        wire.HEAD.pack,
        st.integers(0, 2**64 - 1),
        st.integers(0, wire.MAX_RUNS + 1),
        st.integers(0, wire.MAX_PAYLOAD_BYTES + 1),
        *(st.integers(0, 2**32 - 1) for _ in range(4)),
    ),
)


@given(data=HEADS)
def test_the_head_of_a_frame_is_bounded(data: bytes) -> None:
    with contextlib.suppress(PeerMisbehaved):
        head = wire.read_head(data)
        assert head.payload_bytes > 0
        if head.part is None:
            assert 0 < head.runs <= wire.MAX_RUNS
            assert head.payload_bytes <= wire.MAX_PAYLOAD_BYTES


PART = st.builds(
    KVSlice, *(st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)) for _ in range(4))
)


@given(part=PART, size=st.integers(1, 2**32 - 1), honest=st.booleans())
def test_a_part_that_is_accepted_lies_within_the_landing(
    part: KVSlice, size: int, honest: bool
) -> None:
    landings = Landings(TARGET)
    pool = np.zeros(TARGET_BLOCKS * TARGET.block_bytes, np.uint8)
    landings.expect(LANDING, pool, lambda: None, lambda _: b"", lambda _: None)
    entry = landings.claim(LANDING.id, LANDING.epoch, LANDING.secret, object())
    if honest:
        size = part.layers * (part.end - part.start) * TARGET.token_bytes // TARGET.layers
    try:
        addresses, lengths = Arrivals(entry, digest=True).places(part, size)
    except PeerMisbehaved:
        return
    entry.check(addresses - pool.ctypes.data, lengths)
    assert lengths.sum() == size


NUMBERS = st.one_of(
    st.integers(-2, 4096), st.integers(-(2**63), 2**63 - 1), st.just(2**62), st.just(2**63 - 1)
)


@given(
    runs=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6),
    payload=st.integers(1, wire.MAX_PAYLOAD_BYTES),
    honest=st.booleans(),
)
@example(runs=[(0, 2**63 - 1), (0, 2**63 - 1), (0, 66)], payload=64, honest=False)
def test_runs_that_are_accepted_lie_within_the_landing_and_make_up_the_payload(
    runs: list[tuple[int, int]], payload: int, honest: bool
) -> None:
    offsets, lengths = np.array(runs, "<i8").T
    if honest:
        lengths = np.abs(lengths) % 64 + 1
        payload = int(lengths.sum())
    table = offsets.tobytes() + lengths.tobytes()
    landings = Landings(TARGET)
    pool = np.zeros(TARGET_BLOCKS * TARGET.block_bytes, np.uint8)
    landings.expect(LANDING, pool, lambda: None, lambda _: b"", lambda _: None)
    entry = landings.claim(LANDING.id, LANDING.epoch, LANDING.secret, object())
    mine = np.zeros(TARGET_BLOCKS, bool)
    mine[list(LANDING.blocks)] = True
    try:
        starts, sizes = wire.runs_of(memoryview(table), payload)
        entry.check(starts, sizes)
    except PeerMisbehaved:
        return
    assert sum(sizes.tolist()) == payload
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        assert 0 <= start < start + size <= len(pool)
        assert mine[
            start // TARGET.block_bytes : (start + size - 1) // TARGET.block_bytes + 1
        ].all()


INVITATION = msgspec.msgpack.encode(
    shm.Invitation((shm.Piece(0, 0, 4096),), shm.Piece(1, 0, 1), shm.Piece(2, 0, 1))
)
TERMS, GREETING = (
    msgspec.msgpack.encode(it)
    for it in (nixl.Terms(b"agent", 4096), nixl.Greeting("name", nixl.Process.here(), False))
)
NESTED = b"\x91" * 5000


@pytest.mark.parametrize("parser", [shm.invitation, nixl.terms, nixl.greeting])
@given(body=garbage([INVITATION, TERMS, GREETING]))
@example(body=b"\x94" + INVITATION[1:] + NESTED)
@example(body=b"\x93" + TERMS[1:] + NESTED)
@example(body=b"\x94" + GREETING[1:] + NESTED)
def test_what_a_transport_says_in_a_greeting_is_read_or_refused(
    parser: Callable[[bytes], Any], body: bytes
) -> None:
    with contextlib.suppress(PeerMisbehaved):
        assert isinstance(parser(body), msgspec.Struct)


@given(data=st.binary(max_size=32))
def test_a_proof_is_a_number_or_refused(data: bytes) -> None:
    with contextlib.suppress(PeerMisbehaved):
        assert wire.proof_of(data) >= 0


def parted(**wrong: Any) -> Landing:
    """A landing in two parts, of which the second is as it was told."""
    right = Part(0, 0, Shard(0, 1), Shard(0, 1), b"s"), Part(0, 1, Shard(1, 1), Shard(1, 1), b"s")
    parts = right[0], msgspec.structs.replace(right[1], **wrong)
    return msgspec.structs.replace(LANDING, parts=parts)


@given(encoded=garbage([msgspec.msgpack.encode(it) for it in (LANDING, parted())]))
@example(encoded=msgspec.msgpack.encode(parted(shard=Shard(1 << 40, 5))))
@example(encoded=msgspec.msgpack.encode(parted(heads=Shard(1 << 40, 5))))
@example(encoded=msgspec.msgpack.encode(parted(shard=None)))
def test_a_landing_from_a_stranger_is_used_or_refused(encoded: bytes) -> None:
    """The control plane passes landings on; the sender must not trust what is in them."""
    try:
        landing = msgspec.msgpack.decode(encoded, type=Landing)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    pool = np.zeros(SOURCE_BLOCKS * SOURCE.block_bytes, np.uint8)
    source = Source(SOURCE, pool, SOURCE_BLOCKS, (5, 6, 1, 3), TOKENS)
    with contextlib.suppress(LayoutMismatch, PeerMisbehaved):
        for _, _, piece in pieces(landing):
            Conversion(plan(source.layout, piece.layout, heads=piece.heads), source, piece)
