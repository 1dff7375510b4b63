"""The sending end of one handoff: push slices as they become final, then commit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from backends.protocol import First
from transfer.contract import KVSlice, Receipt, Sender, Source, Writer
from transfer.errors import TransferError
from transfer.layout import Landing

_note = msgspec.msgpack.Encoder()
_read_note = msgspec.msgpack.Decoder(tuple[First, ...])


def encode_note(firsts: tuple[First, ...]) -> bytes:
    """What the decode worker must know beyond the KV: the tokens sampled from the prefix."""
    return _note.encode(firsts)


def decode_note(note: bytes) -> tuple[First, ...]:
    """The reverse of `encode_note`.

    Raises:
        msgspec.DecodeError: these bytes are no such note.
    """
    return _read_note.decode(note)


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
        sender: Sender,
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
        self._parts: asyncio.Queue[KVSlice | bytes] = asyncio.Queue()
        self._first_ready: float | None = None
        self._last_ready = 0.0
        self.writer: Writer | None = None

    def slice(self, part: KVSlice) -> None:
        """`part` is final in the source."""
        self._last_ready = time.monotonic()
        if self._first_ready is None:
            self._first_ready = self._last_ready
        self._parts.put_nowait(part)

    def finish(self, firsts: tuple[First, ...]) -> None:
        """All slices have been given; commit after the last one."""
        self._parts.put_nowait(encode_note(firsts))

    async def run(self, source: Source) -> None:
        """Open, write, commit. Failures go to `failed`; a cancelled run tells nobody."""
        try:
            self.writer = await self._sender.open(self.landing, source)
            while isinstance(part := await self._parts.get(), KVSlice):
                await self.writer.write(part)
            receipt = await self.writer.commit(part, self._commit_seconds)
        except (TransferError, TimeoutError) as error:
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
