"""Hand over codes instead of numbers, over any transport (see `coding.py`).

The sender encodes each group of tokens as soon as all of it is final, into memory of its own, and
that is what the transport below moves and proves: a handoff between two coded pools. The receiver
has a coded pool for such landings, and decodes what was verified there into its own (`decode`).
Late writes reach that coded pool and nothing else.

A transport with a codec has a name of its own, `tcp+int8`, so that a pair chooses it like any
other: by how fast the codec and the link below prove to be together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from math import lcm

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.coding import (
    CODECS,
    MARK,
    Codec,
    coded_layout,
    decode_groups,
    encode_layer,
    plain_layout,
    scratch_bytes,
)
from transfer.contract import KVSlice, Probe, Receipt, Sender, Source, Writer, nobody_cares
from transfer.convert import Conversion
from transfer.errors import LayoutMismatch, PeerLost, PeerMisbehaved
from transfer.layout import Endpoint, Epoch, KVLayout, Landing
from transfer.plan import Plan, plan
from transfer.pool import Buffer, Pool
from transfer.rounding import KIND

WINDOW_BYTES = 1 << 20
"""About how many floats are made before they are encoded: as much as a cache holds."""

PIECE_BYTES = 4 << 20
"""About how much of the source is encoded before it is sent, while the next piece is encoded."""

SAMPLE_BYTES = 8 << 20
SAMPLE_ROUNDS = 3
SAMPLE = 0x3C
"""A byte of which every kind of float is a plain number."""

KEPT_BUFFERS = 4
"""Buffers of codes that are kept for the next handoffs, as fresh memory is slow."""


def named(transport: str, codec: Codec) -> str:
    """What a transport is called that carries codes."""
    return f"{transport}+{codec}"


def codec_of(transport: str) -> Codec | None:
    """Which codes a transport carries, by its name; None for numbers as they are."""
    name = transport.partition("+")[2]
    return next((codec for codec in CODECS if codec == name), None)


class CodedSender:
    """A `Sender` that encodes what `inner` then moves."""

    def __init__(self, inner: Sender, codec: Codec, threads: ThreadPoolExecutor) -> None:
        """Encode in `threads`, which are not ours to end."""
        self.lost: Callable[[Endpoint, PeerLost], None] = nobody_cares
        self._inner = inner
        self._codec: Codec = codec
        self._threads = threads
        self._names: dict[Endpoint, Endpoint] = {}
        self._ends: dict[Endpoint, tuple[KVLayout, KVLayout]] = {}
        self._buffers: list[NDArray[np.uint8]] = []
        inner.lost = self._on_lost

    async def connect(self, endpoint: Endpoint, source: KVLayout, target: KVLayout) -> str:
        """As `Sender.connect`; `target` is the pool's layout."""
        agreed = plan(source, plain_layout(target))
        coded = coded_layout(target, self._codec)
        below = _below(endpoint)
        self._names[below], self._ends[endpoint] = endpoint, (source, target)
        await self._inner.connect(below, coded, coded)
        share = coded.token_bytes / target.token_bytes
        return f"{agreed.line}; LOSSY {self._codec} codes, {share:.0%} of the bytes"

    async def probe(self, endpoint: Endpoint) -> Probe:
        """As `Sender.probe`: bytes of numbers per second, codec and link together.

        Encoding and sending go on side by side, decoding begins when all is there.
        """
        source, target = self._ends[endpoint]
        link = await self._inner.probe(_below(endpoint))
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(
            self._threads, encodes_per_second, self._codec, source, target
        )
        decoded = endpoint.decodes_per_second or await loop.run_in_executor(
            self._threads, decodes_per_second, self._codec, target
        )
        coded = coded_layout(target, self._codec)
        share = coded.token_bytes / target.token_bytes
        encodes, decodes = encoded * target.item_bytes, decoded * target.item_bytes
        note = f"encodes {encodes / 1e9:.1f}, decodes {decodes / 1e9:.1f} GB/s"
        if not link.bytes_per_second:
            return Probe(0.0, link.round_trip_seconds, note)
        sends = share / link.bytes_per_second
        rate = 1 / (max(sends, 1 / encodes) + 1 / decodes)
        return Probe(rate, link.round_trip_seconds, note)

    async def open(self, landing: Landing, source: Source) -> Writer:
        """As `Opener.open`; the landing is one in a coded pool."""
        coded = landing.layout
        plain = _plain_of(landing, self._codec)
        agreed = plan(source.layout, plain)
        groups = coded.blocks_for(source.tokens)
        padded = groups * coded.block_tokens
        if landing.tokens != padded:
            raise PeerMisbehaved(f"landing {landing.id}: tokens: {landing.tokens}, not {padded}")
        mine = tuple(_below(it) for it in landing.endpoints if codec_of(it.transport))
        landing = msgspec.structs.replace(landing, endpoints=mine)
        buffer = self._take(groups * coded.block_bytes)
        codes = Source(
            coded, buffer[: groups * coded.block_bytes], groups, tuple(range(groups)), padded
        )
        try:
            encoder = Encoder(agreed, source, codes, self._codec)
            writer = await self._inner.open(landing, codes)
        except BaseException:
            self._give(buffer)
            raise
        return CodedWriter(writer, encoder, self._threads, lambda: self._give(buffer))

    async def close(self) -> None:
        """As `Sender.close`."""
        await self._inner.close()

    def _on_lost(self, below: Endpoint, reason: PeerLost) -> None:
        endpoint = self._names.get(below)
        if endpoint is not None:
            self.lost(endpoint, reason)

    def _take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of at least so many bytes."""
        fits = [it for it in self._buffers if it.size >= size]
        if not fits:
            return np.zeros(size, np.uint8)
        best = min(fits, key=lambda it: it.size)
        self._buffers = [it for it in self._buffers if it is not best]
        return best

    def _give(self, buffer: NDArray[np.uint8]) -> None:
        self._buffers = [*self._buffers, buffer][-KEPT_BUFFERS:]


class Encoder:
    """One prefix on its way into codes. One thread at a time uses it."""

    def __init__(self, agreed: Plan, source: Source, codes: Source, codec: Codec) -> None:
        """Prepare; raises as `Conversion`."""
        self.tokens = source.tokens
        self.group = agreed.target.head_dim
        self._layout = agreed.target
        self._kind = KIND[codec]
        self.codes = codes
        groups = tuple(range(len(codes.blocks)))
        self._conversion = Conversion(agreed, source, _nowhere(agreed.target, groups, self.tokens))
        self._scratch = np.zeros(scratch_bytes(self.group), np.uint8)
        group_bytes = self._layout.block_bytes // self._layout.layers
        self._window = max(1, WINDOW_BYTES // group_bytes) * self.group
        self._floats = np.empty(self._window // self.group * group_bytes, np.uint8)

    def piece_layers(self, tokens: int) -> int:
        """How many layers of so many tokens are encoded at a time: one at least."""
        return max(1, PIECE_BYTES // (self._layout.token_bytes // self._layout.layers * tokens))

    def encode(self, part: KVSlice) -> None:
        """Encode a slice that begins with a group and ends with one, or with the prefix."""
        layout, base = self._layout, self.codes.pool.ctypes.data
        for layer in range(part.layer, part.layer + part.layers):
            for start in range(part.start, part.end, self._window):
                end = min(part.end, start + self._window)
                self._conversion.fill(KVSlice(layer, start, end), self._floats.ctypes.data)
                encode_layer(
                    self._kind,
                    self._floats.ctypes.data,
                    start // self.group,
                    end - start,
                    layout.heads.count,
                    self.group,
                    layer,
                    layout.layers,
                    base,
                    self._scratch.ctypes.data,
                )


class CodedWriter:
    """A `Writer` of codes. Slices come in order: a layer's later tokens after its earlier ones."""

    def __init__(
        self,
        inner: Writer,
        encoder: Encoder,
        threads: ThreadPoolExecutor,
        closed: Callable[[], None],
    ) -> None:
        """Write through `inner`; `closed` is called when nothing uses the codes any more."""
        self._inner = inner
        self._encoder = encoder
        self._threads = threads
        self._closed: Callable[[], None] | None = closed
        self._encoded: dict[int, int] = {}
        self._busy: Future[None] | None = None

    async def write(self, part: KVSlice) -> None:
        """As `Writer.write`; what does not fill a group yet waits for the rest of it."""
        due = iter(self._due(part))
        some = self._begin(due)
        while some is not None:
            assert self._busy is not None
            await asyncio.shield(asyncio.wrap_future(self._busy))
            encoded, some = some, self._begin(due)
            if encoded.end == self._encoder.tokens:  # what its last group was filled up with
                encoded = msgspec.structs.replace(encoded, end=self._encoder.codes.tokens)
            await self._inner.write(encoded)

    async def commit(self, note: bytes, seconds: float) -> Receipt:
        """As `Writer.commit`."""
        return await self._inner.commit(note, seconds)

    async def abort(self) -> None:
        """As `Writer.abort`; waits for what is being encoded, which reads the source."""
        if self._busy is not None:
            await asyncio.wait([asyncio.wrap_future(self._busy)])
        await self._inner.abort()
        if self._closed is not None:
            closed, self._closed = self._closed, None
            closed()

    def _begin(self, due: Iterator[KVSlice]) -> KVSlice | None:
        """Start encoding the next of them, if there is one, and return it."""
        part = next(due, None)
        if part is not None:
            self._busy = self._threads.submit(self._encoder.encode, part)
        return part

    def _due(self, part: KVSlice) -> list[KVSlice]:
        """What can be encoded now: layers that are equally far go together, up to a piece."""
        group, tokens = self._encoder.group, self._encoder.tokens
        end = part.end if part.end == tokens else part.end // group * group
        due: list[KVSlice] = []
        for layer in range(part.layer, part.layer + part.layers):
            start = self._encoded.get(layer, 0)
            if start >= end:
                continue
            self._encoded[layer] = end
            one = KVSlice(layer, start, end)
            full = due and due[-1].layers >= self._encoder.piece_layers(end - due[-1].start)
            both = due[-1].joined(one) if due and not full else None
            due[-1:] = [both] if both is not None else [*due[-1:], one]
        return due


def decode(
    codec: Codec,
    coded: Source,
    tokens: int,
    target: KVLayout,
    pool: Buffer,
    pool_blocks: int,
    blocks: tuple[int, ...],
    unwanted: Callable[[], bool] = lambda: False,
) -> None:
    """Decode a prefix of `tokens` tokens from a coded pool into `blocks` of another.

    Slow; any thread. It stops early once it is `unwanted`.

    Raises:
        ValueError: pools, blocks and tokens contradict each other.
    """
    plain = plain_layout(target)
    dim, layers, heads = plain.head_dim, plain.layers, plain.heads.count
    agreed = plan(plain, target)
    into = Pool.of(target, pool_blocks, pool)
    base = int(Pool.of(coded.layout, coded.pool_blocks, coded.pool).bases[0])
    places = np.array(coded.blocks, np.int64)
    if not all(0 <= it < coded.pool_blocks for it in coded.blocks):
        raise ValueError(f"blocks: not all of them are in a pool of {coded.pool_blocks}")
    step = lcm(dim, target.block_tokens)
    groups = step // dim
    floats = np.empty(groups * plain.block_bytes, np.uint8)
    scratch = np.zeros(scratch_bytes(dim), np.uint8)
    numbers = tuple(range(groups))
    if tokens > coded.tokens:
        raise ValueError(f"tokens: {tokens} of {coded.tokens}")
    for start in range(0, tokens, step):
        if unwanted():
            return
        count = min(step, tokens - start)
        decode_groups(
            KIND[codec], base, places, start // dim, count, heads, dim, layers,
            floats.ctypes.data, scratch.ctypes.data,
        )  # fmt: skip
        first = start // target.block_tokens
        mine = blocks[first : first + target.blocks_for(count)]
        where = msgspec.structs.replace(_nowhere(target, mine, count), pool_blocks=pool_blocks)
        source = Source(plain, floats, groups, numbers, count)
        Conversion(agreed, source, where).write(KVSlice(0, 0, count, layers), into)


@lru_cache(maxsize=64)
def encodes_per_second(codec: Codec, source: KVLayout, target: KVLayout) -> float:
    """Numbers per second that a thread here makes codes of, from such a pool for such another.

    Measured once, which takes some tens of milliseconds, in time of the CPU: others that use it
    just then say nothing of later. Raises as `plan` and `plain_layout`.
    """
    agreed, codes = plan(source, plain_layout(target)), coded_layout(target, codec)
    tokens = _sample_tokens(codes)
    encoder = Encoder(agreed, _sample(source, tokens), _sample(codes, tokens), codec)
    return _rate(target, tokens, lambda: encoder.encode(KVSlice(0, 0, tokens, target.layers)))


@lru_cache(maxsize=64)
def decodes_per_second(codec: Codec, target: KVLayout) -> float:
    """Numbers per second that a thread here makes of codes, in such a pool; as the other."""
    codes = coded_layout(target, codec)
    tokens = _sample_tokens(codes)
    coded, into = _sample(codes, tokens), _sample(target, tokens)
    return _rate(
        target,
        tokens,
        lambda: decode(
            codec, coded, tokens, target, into.pool, into.pool_blocks, tuple(into.blocks)
        ),
    )


def _sample_tokens(codes: KVLayout) -> int:
    """Whole groups, and enough of them not to fit into a cache."""
    group = codes.block_tokens
    return max(1, SAMPLE_BYTES // (codes.token_bytes * group)) * group


def _sample(layout: KVLayout, tokens: int) -> Source:
    """A pool of just so many tokens."""
    blocks = layout.blocks_for(tokens)
    regions = [
        np.full(table.nbytes // table.regions, SAMPLE, np.uint8)
        for table in layout.tables(blocks)
        for _ in range(table.regions)
    ]
    pool = regions[0] if len(regions) == 1 else regions
    return Source(layout, pool, blocks, tuple(range(blocks)), tokens)


def _rate(layout: KVLayout, tokens: int, act: Callable[[], None]) -> float:
    taken: list[float] = []
    for _ in range(SAMPLE_ROUNDS):
        begun = time.thread_time()
        act()
        taken.append(time.thread_time() - begun)
    return tokens * layout.token_bytes / layout.item_bytes / min(taken)


def _below(endpoint: Endpoint) -> Endpoint:
    """The same endpoint as the transport knows it that carries the codes."""
    return Endpoint(endpoint.transport.partition("+")[0], endpoint.address, endpoint.shard)


def _plain_of(landing: Landing, codec: Codec) -> KVLayout:
    """What is to be encoded for a landing.

    Raises:
        LayoutMismatch: that is not for such codes, or for a part of the heads.
    """
    coded, mark = landing.layout, f"{MARK}{codec}"
    if not coded.model.endswith(mark) or landing.heads is not None or landing.present:
        raise LayoutMismatch(f"landing {landing.id}: it is for no whole prefix in {codec} codes")
    plain = plain_layout(
        msgspec.structs.replace(
            coded,
            model=coded.model.removesuffix(mark),
            dtype="float32",
            head_dim=coded.block_tokens,
        )
    )
    if coded_layout(plain, codec) != coded:
        raise PeerMisbehaved(f"landing {landing.id}: its layout is none of {codec} codes")
    return plain


def _nowhere(layout: KVLayout, blocks: tuple[int, ...], tokens: int) -> Landing:
    """A landing that nobody was granted: it says where a conversion writes to."""
    return Landing(
        id="", epoch=Epoch(0, 0), secret=b"", worker="", endpoints=(), layout=layout,
        pool_blocks=len(blocks), blocks=blocks, tokens=tokens, lease_seconds=0.0,
    )  # fmt: skip
