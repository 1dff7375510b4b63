"""The receiving side's book of landings: who may write where, and how each of them ends.

Knows no wire. A receiver asks it before every write, and again when a handoff is committed; it
makes sure that a landing has one writer, ends once, and is deaf afterwards. Everything but
`Expected.digest` runs on the event loop.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transfer.bounds import Bounds, heads_within
from transfer.contract import Arrival, Buffer, KVSlice, Proof, Source, nobody_minds
from transfer.digest import PrefixDigest, add_up, apart, landing_key, seal
from transfer.errors import DigestMismatch, KeptChanged, LandingGone, PeerMisbehaved
from transfer.layout import Epoch, KVLayout, Landing
from transfer.plan import Plan, plan
from transfer.pool import Pool
from transfer.rows import scatter

State = Literal["open", "verifying", "over"]


class Expected:
    """One landing for which writes are accepted."""

    def __init__(
        self,
        landing: Landing,
        pool: Buffer,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
        claimed: Callable[[], None] = nobody_minds,
        proofs: Sequence[Proof] = (),
    ) -> None:
        """Take note of the landing; `Landings.expect` is the way in."""
        kept = len(proofs) * landing.layout.block_tokens
        if not kept == landing.present < landing.tokens:
            raise ValueError(f"present: {landing.present} tokens, with {len(proofs)} proofs")
        self.landing = landing
        self.pool = Pool.of(landing.layout, landing.pool_blocks, pool)
        if not self.pool.writable:
            raise ValueError("pool: the buffer is read-only")
        self.touched = touched
        self.claimed = claimed
        self.state: State = "open"
        self.writer: object | None = None
        self._arrived = arrived
        self._failed = failed
        self._proofs = tuple(proofs)
        self._prepared: PrefixDigest | None = None
        heads_within(landing)

    @cached_property
    def _bounds(self) -> Bounds:
        return Bounds(self.landing)

    def check(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Refuse runs that do not lie within the landing's blocks, every byte of them.

        Raises:
            PeerMisbehaved: names the first such run.
        """
        wrong = self._bounds.first_outside(offsets, lengths)
        if wrong is not None:
            raise PeerMisbehaved(
                f"landing {self.landing.id}: a run of {lengths[wrong]} bytes at offset "
                f"{offsets[wrong]} is outside its blocks"
            )

    def put(self, data: Buffer, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Copy `data`, which is checked runs one after the other, to where they belong."""
        scatter(data, self.pool.addresses(offsets), lengths)

    @property
    def moved_bytes(self) -> int:
        """What was to be written, in bytes."""
        landing = self.landing
        here = landing.layout.heads.count
        moved = landing.heads.count if landing.heads is not None else here
        tokens = landing.tokens - landing.present
        return tokens * landing.layout.token_bytes * moved // here

    def digest(self, number: int = 0, of: int = 1) -> bytes:
        """Compute the digest of each block that lies in the pool. Slow; any thread.

        Or share `number` of so many, which make up the whole (`total`).
        """
        prepared, self._prepared = self._prepared, None
        digest = prepared if prepared is not None and of == 1 else self.begin_digest()
        mine = _share(digest, self.landing.present, self.landing.tokens, number, of)
        return total([self.digest_of_present(number, of), mine]) if self._proofs else mine

    def prepare(self) -> None:
        """Have ready what `digest` begins with: there is time before the commit, and none then."""
        self._prepared = self.begin_digest()
        self._prepared.prepare(self.landing.present, self.landing.tokens)

    def digest_of_present(self, number: int = 0, of: int = 1) -> bytes:
        """The part of `digest` for what is present.

        Under the keys that it was proven with, with all heads that lie here.
        """
        layout = self.landing.layout
        start, shares = 0, [self.begin_digest().parts()]  # at least so many blocks
        for key, some in groupby(self._proofs, key=lambda it: it.key):
            end = start + len(list(some)) * layout.block_tokens
            digest = self._begin(plan(layout, layout), key)
            shares.append(_share(digest, start, end, number, of))
            start = end
        return total(shares)

    def begin_digest(self) -> PrefixDigest:
        """A digest of each block of this landing to which nothing has been added yet."""
        return self._begin(self.plan, landing_key(self.landing))

    def _begin(self, agreed: Plan, key: bytes) -> PrefixDigest:
        it = self.landing
        size = it.layout.block_tokens
        return PrefixDigest(agreed, self.pool, it.pool_blocks, it.blocks, it.tokens, key, size)

    @cached_property
    def plan(self) -> Plan:
        """From the landing to itself."""
        return plan(self.landing.layout, self.landing.layout, heads=self.landing.heads)

    @property
    def source(self) -> Source:
        """The landing as if it were to be handed over."""
        it = self.landing
        return Source(it.layout, self.pool, it.pool_blocks, it.blocks, it.tokens)

    def begin_verifying(self) -> None:
        """Accept no more writes: from now on the digest is being computed."""
        self.state = "verifying"

    def settle(
        self, found: bytes | None, sent: bytes, sealed: bytes, note: bytes, seconds: float
    ) -> bytes:
        """Compare the digests and end the landing. Returns what its owner answers.

        `found` is None where nothing is to be compared; `sealed` is the seal (`digest.seal`) that
        came with the digest that was sent and the note.

        Raises:
            DigestMismatch: the owner has been told; `KeptChanged` where it is the owner's fault.
            LandingGone: withdrawn meanwhile, or the owner does not want it any more.
        """
        if self.state != "verifying":
            raise LandingGone(f"landing {self.landing.id} was withdrawn")
        self.state = "over"
        landing = self.landing
        mismatch: DigestMismatch | None = None
        blocks = apart(found) if found is not None else []
        if not hmac.compare_digest(sealed, seal(landing, sent, note)):
            mismatch = DigestMismatch(
                f"landing {landing.id}: its note or digest was changed on the way"
            )
        elif found is not None:
            mismatch = self._mismatch(blocks, sent)
        if mismatch is not None:
            self._failed(mismatch)
            raise mismatch
        whole = landing.tokens // landing.layout.block_tokens if landing.heads is None else 0
        key = landing_key(landing)
        proofs = tuple(Proof(key, it) for it in blocks[len(self._proofs) : whole])
        return self._arrived(
            Arrival(landing.id, landing.epoch, note, seconds, self.moved_bytes, proofs)
        )

    def agrees(self, found: bytes, sent: bytes) -> bool:
        """Whether what was written is what was sent."""
        return hmac.compare_digest(found, sent)

    def _mismatch(self, blocks: list[bytes], sent: bytes) -> DigestMismatch | None:
        for block, (proof, found) in enumerate(zip(self._proofs, blocks, strict=False)):
            if found != proof.digest:
                message = f"landing {self.landing.id}: block {block} of what was kept has changed"
                return KeptChanged(message, block)
        if self.agrees(add_up(blocks[len(self._proofs) :]), sent):
            return None
        return DigestMismatch(f"landing {self.landing.id}: the pool holds something else")

    def fail(self, reason: BaseException) -> None:
        """End the landing badly and tell its owner, unless it has ended already."""
        if self.state != "over":
            self.state = "over"
            self._failed(reason)


class Landings:
    """All landings that one receiver expects, by id. One that is over is forgotten."""

    def __init__(self, layout: KVLayout) -> None:
        """Begin with none; every landing must have `layout`."""
        self._layout = layout
        self._book: dict[str, Expected] = {}

    def __len__(self) -> int:
        return len(self._book)

    def expect(
        self,
        landing: Landing,
        pool: Buffer,
        touched: Callable[[], None],
        arrived: Callable[[Arrival], bytes],
        failed: Callable[[BaseException], None],
        claimed: Callable[[], None] = nobody_minds,
        proofs: Sequence[Proof] = (),
    ) -> None:
        """Enter a landing.

        Raises:
            ValueError: it is expected already, or contradicts the pool, its proofs or this
                receiver's layout.
        """
        entry = self._book.get(landing.id)
        if entry is not None and entry.state != "over":
            raise ValueError(f"landing {landing.id} is expected already")
        if landing.layout != self._layout:
            raise ValueError(f"landing {landing.id}: its layout is not this receiver's")
        self._book[landing.id] = Expected(landing, pool, touched, arrived, failed, claimed, proofs)

    def withdraw(self, landing_id: str) -> Expected | None:
        """Forget a landing; its owner is not called any more. Returns it if this ended it.

        An owner that withdraws as it hears of the end does not: the sender is to hear why.
        """
        entry = self._book.pop(landing_id, None)
        if entry is None or entry.state == "over":
            return None
        entry.state = "over"
        return entry

    def claim(
        self,
        landing_id: str,
        epoch: Epoch,
        secret: bytes,
        writer: object,
        place: bytes | None = None,
    ) -> Expected:
        """Make `writer` the only one that may write to a landing.

        `place` is what it takes for `Landing.place`; None where every write is checked anyway.

        Raises:
            LandingGone: unknown, over, claimed before, or with a wrong epoch, secret or place.
        """
        entry = self._book.get(landing_id)
        if entry is None or entry.state != "open":
            raise LandingGone(f"landing {landing_id} is not expected here")
        if not hmac.compare_digest(entry.landing.secret, secret):
            raise LandingGone(f"landing {landing_id}: not with this secret")
        if entry.landing.epoch != epoch:
            raise LandingGone(f"landing {landing_id}: its epoch is {entry.landing.epoch}")
        if place is not None and place != entry.landing.place:
            raise LandingGone(f"landing {landing_id}: its blocks are others")
        if entry.writer is not None:
            raise LandingGone(f"landing {landing_id} has a writer already")
        entry.writer = writer
        entry.claimed()
        return entry

    def forget(self, entry: Expected) -> None:
        """Drop an entry that is over, unless its id has been entered anew."""
        if self._book.get(entry.landing.id) is entry:
            del self._book[entry.landing.id]


def _share(digest: PrefixDigest, start: int, end: int, number: int, of: int) -> bytes:
    """Share `number` of so many of the digest of tokens `start` to `end`: some of the layers."""
    if of == 1:
        digest.add_all(start, end)
    else:
        for layer in range(number, digest.layers, of):
            digest.add(KVSlice(layer, start, end))
    return digest.parts()


def total(shares: Iterable[bytes]) -> bytes:
    """The digests of blocks as a whole, from those of their shares."""
    lanes: NDArray[np.uint64] | None = None
    for share in shares:
        some = np.frombuffer(share, ">u8").astype(np.uint64)
        lanes = some if lanes is None else lanes + some
    return lanes.astype(">u8").tobytes() if lanes is not None else b""
