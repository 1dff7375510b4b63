"""The sending end of handoffs: push slices as they become final, then commit.

`Push` is one handoff, `Pushes` all that are under way on this worker.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

import msgspec
import structlog

from backends.api import BackendInfo
from backends.errors import ProtocolError
from backends.host.janitor import Janitor
from backends.host.pools import pools_of
from backends.host.work import Prefilling
from backends.protocol import UNREADABLE, First, HandedOver
from transfer.contract import Buffer, KVSlice, Opener, Receipt, Source, Writer
from transfer.errors import LayoutMismatch, TransferError
from transfer.layout import Landing
from transfer.sharded import ShardedWriter, pieces

log = structlog.get_logger()

_note = msgspec.msgpack.Encoder()
_read_note = msgspec.msgpack.Decoder(tuple[First, ...])


def encode_note(firsts: tuple[First, ...]) -> bytes:
    """What the decode worker must know beyond the KV: the tokens sampled from the prefix."""
    return _note.encode(firsts)


def decode_note(note: bytes) -> tuple[First, ...]:
    """The reverse of `encode_note`.

    Raises:
        ProtocolError: these bytes are no such note.
    """
    try:
        return _read_note.decode(note)
    except UNREADABLE as error:
        raise ProtocolError(f"not a note: {error}") from error


class Handed(msgspec.Struct, frozen=True):
    """A handoff that succeeded; see `backends.protocol.HandedOver` for the durations."""

    receipt: Receipt
    exposed: float
    overlapped: float


class Push:
    """Pushes one prefix into one landing.

    `run` is the task; `slice`, `finish` feed it from the event loop. However it ends, `closed`
    is called last, when nothing reads the source any more.
    """

    def __init__(
        self,
        sender: Opener,
        landing: Landing,
        *,
        commit_seconds: float,
        handed: Callable[[Handed], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.landing = landing
        self._sender = sender
        self._commit_seconds = commit_seconds
        self._handed = handed
        self._failed = failed
        self._parts: deque[KVSlice] = deque()
        self._note: bytes | None = None
        self._news = asyncio.Event()
        self._first_ready: float | None = None
        self._last_ready = 0.0
        self.writer: Writer | None = None

    def slice(self, part: KVSlice) -> None:
        """`part` is final in the source. What waits to be written is joined."""
        self._last_ready = time.monotonic()
        if self._first_ready is None:
            self._first_ready = self._last_ready
        both = self._parts[-1].joined(part) if self._parts else None
        if both is not None:
            self._parts.pop()
        self._parts.append(both or part)
        self._news.set()

    def finish(self, firsts: tuple[First, ...]) -> None:
        """All slices have been given; commit after the last one."""
        self._note = encode_note(firsts)
        self._news.set()

    async def run(self, sources: Sequence[Source]) -> None:
        """Open, write, commit. Failures go to `failed`; a cancelled run tells nobody."""
        try:
            writer = await self._open(sources)
            while self._note is None or self._parts:
                if self._parts:
                    await writer.write(self._parts.popleft())
                    continue
                self._news.clear()
                await self._news.wait()
            receipt = await writer.commit(self._note, self._commit_seconds)
        except (TransferError, TimeoutError, MemoryError) as error:
            self._failed(error)
            return
        now = time.monotonic()
        began = self._first_ready if self._first_ready is not None else self._last_ready
        self._handed(
            Handed(
                receipt,
                exposed=max(0.0, now - self._last_ready - receipt.verify_seconds),
                overlapped=self._last_ready - began,
            )
        )

    async def _open(self, sources: Sequence[Source]) -> Writer:
        """Begin the handoff, or one from each pool of ours into each pool there."""
        landing = self.landing
        if not landing.parts and len(sources) == 1:
            self.writer = await self._sender.open(landing, sources[0])
            return self.writer
        if not 0 <= max((it.source for it in landing.parts), default=-1) < len(sources):
            raise LayoutMismatch(f"shard: {len(sources)} pools here, which the landing is not for")
        self.writer = writer = ShardedWriter()  # to be aborted, whatever part of it was opened
        for piece in pieces(landing):
            await writer.open(self._sender, piece.landing, sources[piece.source])
        return writer


class Pushes:
    """The handoffs under way from one worker.

    `failed(work, code, detail)` tells that one ended badly; `closed(work)` comes last, however
    it ended: nothing reads the source any more.
    """

    def __init__(
        self,
        sender: Opener,
        pool: Buffer,
        info: BackendInfo,
        janitor: Janitor,
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
        *,
        commit_seconds: float,
        failed: Callable[[Prefilling, str, str], None],
        closed: Callable[[Prefilling], None],
    ) -> None:
        self._sender = sender
        self._pools = pools_of(info, pool)
        self._pool_blocks = info.pool_blocks
        self._janitor = janitor
        self._spawn = spawn
        self._commit_seconds = commit_seconds
        self._failed = failed
        self._closed = closed
        self._tasks: dict[Prefilling, asyncio.Task[None]] = {}

    def __contains__(self, work: Prefilling) -> bool:
        return work in self._tasks

    def prepare(self, work: Prefilling, landing: Landing) -> Push:
        """A push; `begin` it when `work` has its blocks."""
        return Push(
            self._sender,
            landing,
            commit_seconds=self._commit_seconds,
            handed=partial(self._tell, work),
            failed=partial(self._give_up, work),
        )

    def begin(self, work: Prefilling) -> None:
        """Open the handoff, so that its first slice finds it open. Safe to call twice."""
        assert work.push is not None
        if work not in self._tasks:
            self._begin(work, work.push)

    def ready(self, work: Prefilling, part: KVSlice) -> None:
        """`part` of the prefix is final."""
        assert work.push is not None
        self.begin(work)
        work.push.slice(part)

    def cancel(self, work: Prefilling) -> None:
        """Push no more of `work`, if it is being pushed; `closed` says when that is true."""
        if work in self._tasks:
            self._tasks[work].cancel()

    def _begin(self, work: Prefilling, push: Push) -> None:
        blocks, tokens = tuple(work.blocks), len(work.prefix)
        sources = [
            Source(it.layout, it.memory, self._pool_blocks, blocks, tokens) for it in self._pools
        ]
        task = self._spawn(push.run(sources))
        self._tasks[work] = task
        # A callback and no `finally`: a task that is cancelled before it began runs neither.
        task.add_done_callback(lambda _: self._janitor.hand(partial(self._close, work, push)))

    async def _close(self, work: Prefilling, push: Push) -> None:
        if push.writer is not None:
            await push.writer.abort()  # after a commit it only lets go of the source
        del self._tasks[work]
        self._closed(work)

    def _tell(self, work: Prefilling, handed: Handed) -> None:
        work.held.tell(
            HandedOver(
                handle=work.held.handle,
                bytes=handed.receipt.bytes,
                exposed=handed.exposed,
                overlapped=handed.overlapped,
                verify=handed.receipt.verify_seconds,
            )
        )
        log.info(
            "handoff.committed",
            request=work.spec.request,
            bytes=handed.receipt.bytes,
            exposed_ms=round(handed.exposed * 1e3, 2),
            verify_ms=round(handed.receipt.verify_seconds * 1e3, 2),
        )

    def _give_up(self, work: Prefilling, error: Exception) -> None:
        log.warning("handoff.failed", request=work.spec.request, cause=str(error))
        code = type(error).__name__
        self._failed(work, code, str(error) or code)
