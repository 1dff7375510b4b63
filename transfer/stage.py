"""One handoff on a desk: a small pool on either side, a landing, and what its owner was told.

The furniture of `testing/`, which has the promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from transfer.contract import (
    Arrival,
    KVSlice,
    Proof,
    Receipt,
    Receiver,
    Sender,
    Source,
    Writer,
    whole,
)
from transfer.convert import Conversion, Frame, TamperNote
from transfer.errors import TransferError
from transfer.layout import Epoch, KVLayout, Landing
from transfer.plan import plan

PATIENCE_SECONDS = 10.0
SOURCE = KVLayout(
    model="promise",
    weights="float32",
    layers=3,
    kv_heads=2,
    head_dim=8,
    dtype="float32",
    block_tokens=6,
    rope="half",
    axes="layer kv block token head dim",
)
TARGET = msgspec.structs.replace(
    SOURCE, block_tokens=4, dtype="bfloat16", axes="block layer kv head token dim"
)
SOURCE_BLOCKS = 8
STAGE_BLOCKS = 16
TARGET_BLOCKS = 8 * STAGE_BLOCKS
TOKENS = 21


class BrokenPromise(AssertionError):
    """A transport does not do what its contract says."""


class Pair(NamedTuple):
    """Both ends of a transport, ready to be used.

    While the context that `stall` gives is open, whatever is written gets stuck on its way.
    Without it, the promises about stalled senders are not checked.

    `pool` is for a receiver that must know its pool beforehand: `TARGET_BLOCKS` blocks of `TARGET`.

    While the context that `damage_notes` gives is open, every note loses a bit on its way. Without
    it, the promise about notes is not checked.
    """

    sender: Sender
    receiver: Receiver
    stall: Callable[[], AbstractContextManager[object]] | None = None
    pool: NDArray[np.uint8] | None = None
    damage_notes: Callable[[], AbstractContextManager[object]] | None = None


class Noted(Protocol):
    """A sender that shows each note to `tamper_note` after it was sealed."""

    tamper_note: TamperNote | None


@contextlib.contextmanager
def damaged_notes(sender: Noted) -> Iterator[None]:
    """Change a bit of each note that `sender` sends; for `Pair.damage_notes`."""
    sender.tamper_note = lambda note: bytes([note[0] ^ 0x10]) + note[1:]
    try:
        yield
    finally:
        sender.tamper_note = None


class Gate:
    """A `Tamper` for senders that write in a thread: while it is closed, frames wait there."""

    def __init__(self) -> None:
        """Begin open."""
        self.waiting = 0
        self._open = threading.Event()
        self._open.set()

    def __call__(self, landing_id: str, frame: Frame) -> Frame:
        """Let a frame pass, now or later."""
        self.waiting += 1
        passed = self._open.wait(PATIENCE_SECONDS)
        self.waiting -= 1
        require(passed, "a gate was never opened again")
        return frame

    @contextlib.contextmanager
    def closed(self) -> Iterator[Gate]:
        """Hold frames up; as `Pair.stall`."""
        self._open.clear()
        try:
            yield self
        finally:
            self._open.set()


MakePair = Callable[[KVLayout], AbstractAsyncContextManager[Pair]]


class Stage:
    """One sender, one receiver, one landing that is expected, and what its owner was told."""

    def __init__(self, pair: Pair, number: int = 1) -> None:
        """Set a landing aside in a pool full of old numbers, and expect it.

        Stages 1 to 8 may share a pool: `mine` are the bytes that nobody but this one touches.
        """
        self.sender, self.receiver, pool = pair.sender, pair.receiver, pair.pool
        random = np.random.default_rng(number)
        self.source_pool: NDArray[np.float32] = random.standard_normal(
            SOURCE_BLOCKS * SOURCE.block_bytes // 4, dtype=np.float32
        )
        first = (number - 1) * STAGE_BLOCKS
        block = TARGET.block_bytes
        self.mine = slice(first * block, (first + STAGE_BLOCKS) * block)
        self.pool = np.zeros(TARGET_BLOCKS * block, dtype=np.uint8) if pool is None else pool
        self.pool[self.mine] = random.integers(0, 100, STAGE_BLOCKS * block, dtype=np.uint8)
        self.source = Source(SOURCE, self.source_pool, SOURCE_BLOCKS, (5, 6, 1, 3), TOKENS)
        self.landing = Landing(
            id=f"promise-{number}",
            epoch=Epoch(7, number),
            secret=bytes([number]) * 16,
            worker="decode",
            endpoints=(self.receiver.endpoint,),
            layout=TARGET,
            pool_blocks=TARGET_BLOCKS,
            blocks=tuple(first + block for block in (9, 2, 3, 4, 14, 0)),
            tokens=TOKENS,
            lease_seconds=60.0,
        )
        self.before = self.pool.copy()
        self.touches = 0
        self.claims: list[int] = []
        self.arrivals: list[Arrival] = []
        self.failures: list[BaseException] = []
        self.told = asyncio.Event()
        self.expect()

    def expect(self, proofs: Sequence[Proof] = ()) -> None:
        """Accept writes for the landing."""
        self.receiver.expect(
            self.landing,
            self.pool,
            touched=self._touched,
            arrived=self._arrived,
            failed=self._failed,
            claimed=self._claimed,
            proofs=proofs,
        )

    def _claimed(self) -> None:
        self.claims.append(self.touches)

    def _touched(self) -> None:
        self.touches += 1

    def _arrived(self, arrival: Arrival) -> bytes:
        self.arrivals.append(arrival)
        self.told.set()
        return b"taken: " + arrival.note

    def _failed(self, reason: BaseException) -> None:
        """As owners do: its blocks are to be used again."""
        self.receiver.withdraw(self.landing.id)
        self.failures.append(reason)
        self.told.set()

    def wanted(self) -> NDArray[np.uint8]:
        """What the target pool should hold after the handoff."""
        pool = self.before.copy()
        conversion = Conversion(plan(SOURCE, TARGET), self.source, self.landing)
        for part in whole(SOURCE.layers, TOKENS):
            for frame in conversion.frames(part):
                at = 0
                for offset, length in zip(frame.offsets, frame.lengths, strict=True):
                    pool[offset : offset + length] = frame.data[at : at + length]
                    at += length
        return pool

    async def write_all(self, writer: Writer) -> None:
        """Write the whole prefix, in slices of two chunks per layer."""
        for start, end in ((0, 10), (10, TOKENS)):
            for layer in range(SOURCE.layers):
                await writer.write(KVSlice(layer, start, end))

    async def hand_over(self, landing: Landing | None = None) -> Receipt:
        """Open, write all, commit; whatever happens, abort."""
        writer = await self.sender.open(landing or self.landing, self.source)
        try:
            await self.write_all(writer)
            return await writer.commit(b"note", PATIENCE_SECONDS)
        finally:
            await writer.abort()

    async def landed(self) -> None:
        """Wait until everything that was written lies in the pool."""
        wanted = self.wanted()
        await eventually(lambda: bool((self.pool == wanted).all()), "the prefix did not arrive")


@contextlib.asynccontextmanager
async def on_stage(make: MakePair) -> AsyncIterator[Stage]:
    """A stage of a fresh pair."""
    async with make(TARGET) as pair:
        yield Stage(pair)


async def eventually(holds: Callable[[], bool], otherwise: str) -> None:
    """Wait until `holds`, or break the promise."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holds():  # noqa: ASYNC110 -- memory changes without telling anyone
                await asyncio.sleep(0.001)
    require(holds(), otherwise)


def require(condition: bool, otherwise: str) -> None:
    """Break the promise unless `condition`.

    Raises:
        BrokenPromise: it does not hold.
    """
    if not condition:
        raise BrokenPromise(otherwise)


async def refused(attempt: Awaitable[object], kind: type[TransferError] = TransferError) -> None:
    """Break the promise unless `attempt` fails with an error of `kind`."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await attempt
    except kind:
        return
    except TransferError as error:
        raise BrokenPromise(f"refused with {error!r}, where {kind.__name__} was due") from error
    except TimeoutError as error:
        raise BrokenPromise("nothing was answered in time") from error
    raise BrokenPromise(f"it was accepted, where {kind.__name__} was due")
