"""The receiving end of handoffs: landings granted, renewed, expired, quarantined.

A landing ends once: its prefix arrives, or it is withdrawn. A withdrawn one keeps its blocks in
quarantine until its transport says that no late write can reach them. As every landing that is open
may end so, what one prefill worker may hold in both is bounded, and not quarantine alone: a worker
that stops while it has many landings must not take them all with it.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections import Counter
from collections.abc import Callable
from math import inf

import msgspec
import structlog

from backends.api import BackendInfo
from backends.errors import PoolExhausted
from backends.host.config import HostConfig
from backends.host.janitor import Janitor
from backends.host.ledger import Holder, Ledger
from backends.host.pools import pools_of
from backends.host.reserved import Reserved, Staged
from backends.host.reuse import Reuse
from backends.host.staging import Staging, Stagings
from backends.host.work import Held, deadline_of
from backends.protocol import RequestSpec
from transfer.coded import codec_of
from transfer.coding import Codec
from transfer.contract import Arrival, Buffer, Receiver
from transfer.errors import KeptChanged, LandingGone, LayoutMismatch
from transfer.layout import Epoch, Landing, Part, Shard
from transfer.sharded import Gathering, Piece, parts_of

log = structlog.get_logger()

SWEEP_SECONDS = 0.25

Where = tuple[Codec | None, str]
"""Which pool a prefill worker writes to: that of a codec, or the backend's."""


class Landings:
    """All landings of one worker."""

    def __init__(
        self,
        config: HostConfig,
        info: BackendInfo,
        pool: Buffer,
        ledger: Ledger,
        reuse: Reuse,
        janitor: Janitor,
        incarnation: int,
        *,
        admit: Callable[[Reserved, Arrival], None],
        failed: Callable[[Reserved, str, str], None],
        freed: Callable[[], None],
        shunned: Callable[[], None] = lambda: None,
        reclaim: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._info = info
        self._pools = pools_of(info, pool)
        self._ledger = ledger
        self._reuse = reuse
        self._janitor = janitor
        self._incarnation = incarnation
        self._admit = admit
        self._failed = failed
        self._freed = freed
        self._tell_shunned = shunned
        self._reclaim = reclaim
        self._count = 0
        self._open: dict[str, Reserved] = {}
        self._exposed: Counter[Where] = Counter()  # blocks in both, by pool and prefill worker
        self._quarantined: Counter[Where] = Counter()
        self._quiescing = 0
        self.receivers: list[Receiver] = []
        self.stagings: Stagings = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def quiescing(self) -> int:
        """Withdrawn landings that are not quiet yet."""
        return self._quiescing

    @property
    def shunned(self) -> tuple[str, ...]:
        """Prefill workers that have blocks in quarantine, and may hold no more than they do."""
        full = {it for it in self._quarantined if self._exposed[it] >= self._most(it[0])}
        return tuple(sorted({prefill for _, prefill in full}))

    @property
    def quarantined(self) -> int:
        """Blocks in quarantine, those of codes included."""
        ledgers = (self._ledger, *(it.ledger for it in self.stagings.values()))
        return sum(it.held_for("quarantine") for it in ledgers)

    def _most(self, codec: Codec | None) -> float:
        blocks = self.stagings[codec].ledger.blocks if codec is not None else self._info.pool_blocks
        return self._config.quarantine_share * blocks

    def reserve(
        self,
        held: Held,
        spec: RequestSpec,
        *,
        prefill: str = "",
        transport: str = "",
        partial: bool = False,
        sources: tuple[Shard, ...] = (),
    ) -> Reserved:
        """Set aside the prefix's blocks, and one more for each sequence to grow into.

        `prefill` is the worker that will write there, over `transport`; empty: any. `partial`: it
        may be told that a part of the prefix is here already. `sources` are the heads in each of
        its pools, where it has several.

        Raises:
            PoolExhausted: not now.
            LayoutMismatch: it lacks heads.
        """
        receivers = self._through(transport)
        codec = codec_of(transport)
        staging = self.stagings[codec] if codec is not None else None
        if staging is not None:  # what is kept would have to be exact
            partial, spec = False, msgspec.structs.replace(spec, salt=b"")
        reused = Holder("reused", held.name)
        links = self._reuse.links(spec.salt, spec.prefix)
        tokens, headroom = len(spec.prefix), len(spec.sequences)
        layouts = [it.layout for it in self._pools]
        parts = parts_of(sources or (self._info.layout.heads,), layouts)
        if parts and staging is not None:
            raise LayoutMismatch("shards: there are no codes from several pools")
        most = (tokens - 1) // self._info.layout.block_tokens if partial else 0
        kept = self._reuse.share(links, most, reused)
        wanted = self._info.layout.blocks_for(tokens) - len(kept)
        written = staging.layout.blocks_for(tokens) if staging is not None else wanted
        full = (
            self._exhausted(prefill, staging, written)
            or self._crowded(wanted)
            or self._short(wanted + headroom)
        )
        if full:
            self._ledger.release(reused)
            raise PoolExhausted(full)
        holder, spare = Holder("landing", held.name), Holder("headroom", held.name)
        blocks = [it.block for it in kept] + self._ledger.take(wanted, holder)
        self._ledger.take(headroom, spare)
        staged, landing_blocks = None, blocks
        if staging is not None:
            staged = Staged(staging, Holder("landing", held.name))
            landing_blocks = staging.ledger.take(written, staged.holder)
        reserved = Reserved(
            held,
            spec,
            self._mint(landing_blocks, tokens, receivers, len(kept), parts, staging),
            holder,
            spare,
            _now() + self._config.lease_seconds,
            deadline_of(spec),
            prefill,
            receivers,
            reused,
            kept,
            links,
            blocks,
            staged,
        )
        self._expect(reserved)
        self._tally(self._exposed, reserved, 1)
        return reserved

    def _through(self, transport: str) -> tuple[Receiver, ...]:
        """Those who receive over that transport; empty: over any but codes."""
        receivers = tuple(
            it
            for it in self.receivers
            if it.endpoint.transport == transport
            or (not transport and codec_of(it.endpoint.transport) is None)
        )
        if transport and not receivers:
            raise PoolExhausted(f"nothing is received over {transport}")
        return receivers

    def _exhausted(self, prefill: str, staging: Staging | None, wanted: int) -> str:
        """Why that worker may not write to so many blocks more; empty when it may."""
        where = staging.codec if staging is not None else None, prefill
        exposed = self._exposed[where]
        if exposed and exposed + wanted > self._most(where[0]):  # a first one may be that long
            return f"{prefill} may write to {exposed} blocks already"
        if staging is not None and staging.ledger.free < wanted:
            return f"{wanted} blocks wanted for codes, {staging.ledger.free} free"
        return ""

    def _crowded(self, wanted: int) -> str:
        """Why so many blocks more may not wait in landings; empty when they may."""
        waiting = self._ledger.held_for("landing", "headroom", "quarantine")
        if waiting and waiting + wanted > self._config.landing_share * self._info.pool_blocks:
            return f"{waiting} blocks wait in landings already"
        return ""

    def _short(self, wanted: int) -> str:
        """Why there are not so many blocks, even in the place of what nobody owns; or empty."""
        if self._ledger.free < wanted and self._info.kind == "stepped":
            self._reclaim()  # the sequences of an engine lie elsewhere
        free = self._ledger.free
        return f"{wanted} blocks wanted, {free} free" if free < wanted else ""

    def withdraw(self, landing_id: str) -> None:
        """End a landing; its blocks are quarantined until they are quiet. Safe to call twice."""
        reserved = self._open.pop(landing_id, None)
        if reserved is None:
            return
        for receiver, piece in reserved.places():
            receiver.withdraw(piece.landing.id)
        self._ledger.release(reserved.headroom)
        self._ledger.release(reserved.reused)  # nobody writes there
        ledger, holder = self._ledger, reserved.holder
        if (staged := reserved.staged) is not None:
            if staged.decoding:  # which ends what is left
                self._freed()
                return
            self._ledger.release(reserved.holder)  # nor there
            ledger, holder = staged.staging.ledger, staged.holder
        self._freed()
        who = f"{landing_id} from {reserved.prefill}" if reserved.prefill else landing_id
        quarantine = Holder("quarantine", who)
        ledger.move(holder, quarantine)
        self._quiescing += 1
        self._tally(self._quarantined, reserved, 1)
        self._janitor.hand(lambda: self._quiesce(reserved, quarantine))

    async def reap(self) -> None:
        """Withdraw what has expired, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = _now()
            for landing_id, reserved in list(self._open.items()):
                if now > min(reserved.expires, reserved.deadline):
                    self.withdraw(landing_id)
                    self._failed(reserved, "landing_expired", "nobody wrote to the landing in time")

    def _mint(
        self,
        blocks: list[int],
        tokens: int,
        receivers: tuple[Receiver, ...],
        kept: int,
        parts: tuple[Part, ...],
        staging: Staging | None,
    ) -> Landing:
        if staging is not None:
            tokens = len(blocks) * staging.layout.block_tokens  # groups travel as a whole
        self._count += 1
        return Landing(
            id=f"{self._incarnation:x}-{self._count:x}",
            epoch=Epoch(self._incarnation, self._count),
            secret=secrets.token_bytes(16),
            worker=self._config.id,
            endpoints=tuple(receiver.endpoint for receiver in receivers),
            layout=self._info.layout if staging is None else staging.layout,
            pool_blocks=self._info.pool_blocks if staging is None else staging.ledger.blocks,
            blocks=tuple(blocks),
            tokens=tokens,
            lease_seconds=self._config.lease_seconds,
            present=kept * self._info.layout.block_tokens,
            parts=parts,
        )

    def _expect(self, reserved: Reserved) -> None:
        landing_id = reserved.landing.id
        self._open[landing_id] = reserved

        def touched() -> None:
            reserved.expires = _now() + self._config.lease_seconds

        def claimed(through: Receiver, mine: Piece) -> None:
            for receiver, piece in reserved.places():
                if piece.landing.id == mine.landing.id and receiver is not through:
                    receiver.withdraw(piece.landing.id)

        gathering = Gathering(reserved.landing)

        def arrived(arrival: Arrival) -> bytes:
            try:
                whole = gathering.add(arrival)
                if whole is None:
                    return b""
                if reserved.staged is not None:
                    self._begin_decoding(reserved, reserved.staged, whole)
                    return b""
                self._admit(reserved, whole)
            except LandingGone as error:
                failed(error)
                raise
            del self._open[landing_id]
            self._tally(self._exposed, reserved, -1)
            return b""

        def failed(error: BaseException) -> None:
            if isinstance(error, KeptChanged):
                self._reuse.forget(reserved.kept[error.block :])
            self.withdraw(landing_id)
            self._failed(reserved, type(error).__name__, str(error))

        for receiver, piece in reserved.places():
            memory = self._pools[piece.target].memory
            receiver.expect(
                piece.landing,
                memory if reserved.staged is None else reserved.staged.staging.memory,
                touched=touched,
                arrived=arrived,
                failed=failed,
                claimed=functools.partial(claimed, receiver, piece),
                proofs=[it.proof for it in reserved.kept if it.proof is not None],
            )

    def _begin_decoding(self, reserved: Reserved, staged: Staged, arrival: Arrival) -> None:
        """Its codes are verified, and nobody writes there any more: it cannot expire now."""
        staged.decoding = True
        reserved.expires = inf
        self._janitor.hand(lambda: self._decode(reserved, staged, arrival))

    async def _decode(self, reserved: Reserved, staged: Staged, arrival: Arrival) -> None:
        """Decode what has landed, then admit it, if it is still wanted."""
        landing_id, begun = reserved.landing.id, _now()
        failure: Exception | None = None
        try:
            tokens = len(reserved.spec.prefix)
            await staged.staging.decode(
                reserved.landing,
                tokens,
                tuple(reserved.blocks),
                lambda: landing_id not in self._open,
            )
        except MemoryError as error:
            failure = error
        staged.staging.ledger.release(staged.holder)
        self._tally(self._exposed, reserved, -1)
        staged.decoding = False
        if self._open.pop(landing_id, None) is not None and failure is None:
            verify = arrival.verify_seconds + _now() - begun
            try:
                self._admit(
                    reserved, msgspec.structs.replace(arrival, verify_seconds=verify, proofs=())
                )
                return
            except LandingGone as error:
                failure = error
        if failure is not None and reserved.held.landing == landing_id:
            self._ledger.release(reserved.headroom)
            self._ledger.release(reserved.reused)
            self._failed(reserved, type(failure).__name__, str(failure))
        self._ledger.release(reserved.holder)
        self._freed()

    async def _quiesce(self, reserved: Reserved, quarantine: Holder) -> None:
        landing_id = reserved.landing.id
        for receiver, piece in reserved.places():
            await receiver.quiesce(piece.landing.id)
        self._release(reserved, quarantine)
        log.debug("landing.quiesced", landing=landing_id)

    def _release(self, reserved: Reserved, quarantine: Holder) -> None:
        """Nothing can be written to a withdrawn landing any more."""
        ledger = self._ledger if reserved.staged is None else reserved.staged.staging.ledger
        ledger.release(quarantine)
        self._quiescing -= 1
        self._tally(self._quarantined, reserved, -1)
        self._tally(self._exposed, reserved, -1)
        self._freed()

    def _tally(self, what: Counter[Where], reserved: Reserved, sign: int) -> None:
        if not reserved.prefill:
            return
        codec = reserved.staged.staging.codec if reserved.staged is not None else None
        who, before = (codec, reserved.prefill), self.shunned
        what[who] += sign * len(reserved.landing.awaited)
        if not what[who]:
            del what[who]
        if self.shunned != before:
            self._tell_shunned()


def _now() -> float:
    """Leases are kept by the event loop's clock, which a test may let run ahead."""
    return asyncio.get_running_loop().time()
