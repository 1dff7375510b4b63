"""What has arrived of one handoff, and the digest of it, summed up while it is in the cache.

A part is hashed in the pool, by the thread that received it, once all of it is there. That says
what lies in the pool in the end only if nothing is written over it later: so a part counts only if
no byte of it was written before, and anything else that is written voids the sum. What is void is
computed anew, from the whole pool, when everything has arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from transfer.contract import KVSlice
from transfer.convert import Conversion, kept
from transfer.errors import PeerMisbehaved
from transfer.kernels import Tiles
from transfer.landings import Expected
from transfer.sockets import I64
from transfer.tcp.wire import MAX_PAYLOAD_BYTES


class Arrivals:
    """Of one handoff; any thread."""

    def __init__(self, entry: Expected, *, digest: bool) -> None:
        """Begin with nothing; without `digest`, nothing is hashed."""
        self.arrived = 0
        self.due: int | None = None
        self.then: Callable[[], None] | None = None
        self._plan = entry.plan
        self._tokens = entry.landing.tokens
        self._present = entry.landing.present
        self._conversion = Conversion(entry.plan, entry.source, entry.landing)
        self._digest = entry.begin_digest() if digest else None
        self._layers = entry.landing.layout.layers
        self._seen = np.zeros((self._layers, self._tokens), np.bool_)
        self._hashing = False
        self._hashed = 0
        self._lock = threading.Lock()

    def places(self, part: KVSlice, size: int) -> tuple[I64, I64]:
        """Addresses and lengths of the runs, within the landing's blocks, that make up a part.

        Raises:
            PeerMisbehaved: it is no part of what is awaited, too much at once, or not of `size`
                bytes.
        """
        if part.start < self._present:
            raise PeerMisbehaved(f"a frame for token {part.start}, which is there already")
        cells = part.layers * (part.end - part.start)
        if cells * self._plan.token_bytes > MAX_PAYLOAD_BYTES and cells > 1:
            raise PeerMisbehaved(f"a frame of {cells} tokens")
        try:
            addresses, _, lengths = self._conversion.moves(part)
        except ValueError as error:
            raise PeerMisbehaved(str(error)) from error
        if lengths.sum() != size:
            raise PeerMisbehaved(f"a part of {lengths.sum()} bytes in a frame of {size}")
        return addresses, lengths

    def claim(self, part: KVSlice) -> bool:
        """Before a part is written: whether it may be hashed, with `tiles` or with `hash`."""
        with self._lock:
            if self._digest is None:
                return False
            seen = self._seen[part.layer : part.layer + part.layers, part.start : part.end]
            if self._hashing or seen.any():
                self._digest = None
                return False
            seen[:] = True
            self._hashing = True
            return True

    def tiles(self, part: KVSlice) -> Tiles | None:
        """What to hash as the bytes of a part come, where that can be told."""
        with self._lock:
            return self._digest.tiles(part) if self._digest is not None else None

    def void(self) -> None:
        """Before anything else is written, and where something else was hashed."""
        with self._lock:
            self._digest = None

    def hash(self, part: KVSlice) -> None:
        """After a part that was claimed has been written."""
        with self._lock:
            if self._digest is not None:
                self._digest.add(part)
        self.hashed(part)

    def hashed(self, part: KVSlice) -> None:
        """A part that was claimed has been written and hashed."""
        with self._lock:
            self._hashing = False
            self._hashed += self._cells(part)

    def digest(self) -> bytes | None:
        """The digest of each block that was awaited; None if it must be computed anew."""
        with self._lock:
            if self._digest is None:
                return None
            whole = self._cells(KVSlice(0, self._present, self._tokens, self._layers))
            return self._digest.parts() if self._hashed == whole else None

    def _cells(self, part: KVSlice) -> int:
        """Tokens in layers, of those that are kept."""
        return sum(
            some.layers * (some.end - some.start) for some in kept(self._plan, part, self._tokens)
        )
