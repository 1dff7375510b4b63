"""Versions of the code under test that each break one promise: what the checks are worth.

Most are a part exchanged (`Parts`); those inside the digest and the verdict, which production
code makes by itself, exchange a method of a class while they are played.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from backends.host.handoff import Push, Pushes
from backends.host.janitor import Janitor
from backends.host.landings import Landings as HostLandings
from backends.host.ledger import Holder, Ledger
from backends.host.reserved import Reserved
from backends.host.reuse import Reuse
from backends.host.work import Prefilling
from tests.chaos.handoffs.game import Handoffs, Parts
from tests.chaos.handoffs.plot import LEASE_SECONDS
from transfer import digest
from transfer.digest import PrefixDigest
from transfer.landings import Expected, Landings
from transfer.layout import Epoch
from transfer.memory import MemoryReceiver, MemoryWriter
from transfer.rows import Side


class AnyEpoch(Landings):
    def claim(self, landing_id: str, epoch: Epoch, secret: bytes, writer: object) -> Expected:
        entry = self._book.get(landing_id)
        return super().claim(landing_id, entry.landing.epoch if entry else epoch, secret, writer)


class AnySecret(Landings):
    def claim(self, landing_id: str, epoch: Epoch, secret: bytes, writer: object) -> Expected:
        entry = self._book.get(landing_id)
        return super().claim(landing_id, epoch, entry.landing.secret if entry else secret, writer)


class AnyNumberOfWriters(Landings):
    def claim(self, landing_id: str, epoch: Epoch, secret: bytes, writer: object) -> Expected:
        entry = self._book.get(landing_id)
        if entry is not None:
            entry.writer = None
        return super().claim(landing_id, epoch, secret, writer)


class AnyNumberOfWorkers(Landings):
    def claim(self, landing_id: str, epoch: Epoch, secret: bytes, writer: Any) -> Expected:
        entry = self._book.get(landing_id)
        if entry is not None and isinstance(entry.writer, MemoryWriter):
            first: Any = entry.writer._ended
            if first.__self__ is not writer._ended.__self__:
                entry.writer = None
        return super().claim(landing_id, epoch, secret, writer)


class CapsQuarantineAlone(HostLandings):
    def _exhausted(self, prefill: str, staging: Any, wanted: int) -> str:
        exposed, self._exposed = self._exposed, self._quarantined
        try:
            return super()._exhausted(prefill, staging, wanted)
        finally:
            self._exposed = exposed


class CountsWhatHasArrivedForEver(HostLandings):
    def _tally(self, what: Any, reserved: Reserved, sign: int) -> None:
        if sign > 0 or what is self._quarantined:
            super()._tally(what, reserved, sign)


class SkipsQuarantine(HostLandings):
    def withdraw(self, landing_id: str) -> None:
        reserved = self._open.get(landing_id)
        super().withdraw(landing_id)
        if reserved is not None:
            self._ledger.release(Holder("quarantine", f"{landing_id} from {reserved.prefill}"))


class FreesAtAbort(HostLandings):
    async def _quiesce(self, reserved: Reserved, quarantine: Holder) -> None:
        self._release(reserved, quarantine)


class TellsOneReceiver(HostLandings):
    def withdraw(self, landing_id: str) -> None:
        reserved = self._open.get(landing_id)
        everybody = reserved.receivers if reserved is not None else ()
        if reserved is not None:
            reserved.receivers = everybody[:1]
        super().withdraw(landing_id)
        if reserved is not None:
            reserved.receivers = everybody


class WaitsForOneReceiver(HostLandings):
    async def _quiesce(self, reserved: Reserved, quarantine: Holder) -> None:
        await self.receivers[0].quiesce(reserved.landing.id)
        self._release(reserved, quarantine)


class NeverExpires(HostLandings):
    async def reap(self) -> None:
        await asyncio.Event().wait()


class KeepsWhatFailed(HostLandings):
    def withdraw(self, landing_id: str) -> None:
        reserved = self._open.get(landing_id)
        if reserved is not None:
            self._reuse.keep(reserved.links, reserved.landing.blocks)
        super().withdraw(landing_id)


class ForgetsWhatItReused(HostLandings):
    def withdraw(self, landing_id: str) -> None:
        reserved = self._open.get(landing_id)
        if reserved is not None:
            self._ledger.share([it.block for it in reserved.kept], Holder("reused", "nobody"))
        super().withdraw(landing_id)


class PinsNothing(Reuse):
    def share(self, links: Any, most: int, holder: Holder) -> Any:
        return self.prefixes.find(links, most)


class EvictsWhatIsUsed(Ledger):
    def _hold(self, blocks: list[int], holder: Holder) -> None:
        idle = self._idle.copy()
        super()._hold(blocks, holder)
        self._idle = idle


class AwaitsNoAcknowledgement(MemoryReceiver):
    async def quiesce(self, landing_id: str) -> None:
        pass


class TakesTheSilentForDead(MemoryReceiver):
    async def quiesce(self, landing_id: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEASE_SECONDS):
                await super().quiesce(landing_id)


class AdmitsTwice(MemoryReceiver):
    def expect(self, landing: Any, pool: Any, *, arrived: Any, **others: Any) -> None:
        def twice(arrival: Any) -> bytes:
            arrived(arrival)
            answer: bytes = arrived(arrival)
            return answer

        super().expect(landing, pool, arrived=twice, **others)


class ExpiresUnderRenewal(MemoryReceiver):
    def expect(self, landing: Any, pool: Any, *, touched: Any, **others: Any) -> None:
        super().expect(landing, pool, touched=lambda: None, **others)


class TellsNobodyOfAClaim(MemoryReceiver):
    def expect(self, landing: Any, pool: Any, *, claimed: Any, **others: Any) -> None:
        super().expect(landing, pool, **others)


class FreesTwice(Ledger):
    def release(self, holder: Holder) -> int:
        blocks = list(self._held.get(holder, ()))
        freed = super().release(holder)
        for block in blocks if holder.reason == "quarantine" else ():
            heapq.heappush(self._free, block)
        return freed


class LeaksHeadroom(Ledger):
    def release(self, holder: Holder) -> int:
        return 0 if holder.reason == "headroom" else super().release(holder)


class ReleasesTheSourceEarly(Pushes):
    """The source goes when the last slice was queued, not when the commit was answered."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._finished: set[Prefilling] = set()

    def __contains__(self, work: Prefilling) -> bool:
        return super().__contains__(work) and work not in self._finished

    def cancel(self, work: Prefilling) -> None:
        if work not in self._finished:
            super().cancel(work)

    def _begin(self, work: Prefilling, push: Push) -> None:
        super()._begin(work, push)
        finish = push.finish

        def early(firsts: Any) -> None:
            finish(firsts)
            self._finished.add(work)
            asyncio.get_running_loop().call_soon(self._closed, work)

        push.finish = early  # type: ignore[method-assign]


class KeepsFailuresToItself(Pushes):
    def _give_up(self, work: Prefilling, error: Exception) -> None:
        pass


class ForgetsErrands(Janitor):
    def hand(self, errand: Any) -> None:
        pass


def _without_place(*arguments: Any) -> Side:
    side = _places(*arguments)
    return msgspec.structs.replace(side, step=dict.fromkeys(side.step, 0))


def _without_key(new: PrefixDigest, *arguments: Any, **others: Any) -> None:
    *where, _, apart = (*arguments, 1 << 32)[:7]
    _digest_init(new, *where, b"", apart, **others)


def _by_its_beginning(entry: Expected, found: bytes, sent: bytes) -> bool:
    return found.startswith(sent)


def _though_withdrawn(entry: Expected, *arguments: Any) -> bytes:
    entry.state = "verifying"
    return _settle(entry, *arguments)


def _anywhere_in_the_pool(entry: Expected, offsets: Any, lengths: Any) -> None:
    size = entry.landing.pool_blocks * entry.landing.layout.block_bytes
    if np.any((offsets < 0) | (offsets + lengths > size)):
        _check(entry, offsets, lengths)


async def _at_once(writer: MemoryWriter) -> None:
    pass


def _let_go_at_once(writer: MemoryWriter) -> None:
    posted, writer._posted = writer._posted, set()
    _let_go(writer)
    writer._posted = posted
    writer._acknowledge_if_quiet = lambda: None  # type: ignore[method-assign]


_places: Callable[..., Side] = digest._places
_digest_init: Callable[..., None] = PrefixDigest.__init__
_settle: Callable[..., bytes] = Expected.settle
_check: Callable[..., None] = Expected.check
_let_go: Callable[..., None] = MemoryWriter.let_go

REUSED = "a write landed in block"
"""How the checks say that a quarantined block was reused before it was quiet."""


class Mutant(msgspec.Struct, frozen=True):
    """Parts exchanged, or (class, method, replacement); once (module, function, replacement).

    `cause` is what the checks must say when they catch it.
    """

    parts: dict[str, Any] = {}
    method: tuple[Any, str, Any] | None = None
    cause: str = ""

    @contextlib.contextmanager
    def played(self) -> Iterator[Handoffs]:
        """The scenario with this mutant in it."""
        scenario = Handoffs(Parts(**self.parts))
        if self.method is None:
            yield scenario
            return
        owner, name, replacement = self.method
        true = getattr(owner, name)
        setattr(owner, name, replacement)
        try:
            yield scenario
        finally:
            setattr(owner, name, true)


MUTANTS = {
    "drops the epoch check": Mutant({"book": AnyEpoch}),
    "drops the secret check": Mutant({"book": AnySecret}),
    "lets anybody claim a landing again": Mutant({"book": AnyNumberOfWriters}),
    "lets another worker claim a landing too": Mutant(
        {"book": AnyNumberOfWorkers}, cause="a second writer was accepted"
    ),
    "caps what is in quarantine alone": Mutant(
        {"landings": CapsQuarantineAlone}, cause="may write to"
    ),
    "never counts down what can be written to": Mutant(
        {"landings": CountsWhatHasArrivedForEver}, cause="although nothing struck it"
    ),
    "skips the quarantine": Mutant({"landings": SkipsQuarantine}),
    "frees at the abort, not at quiesce": Mutant({"landings": FreesAtAbort}),
    "withdraws at one receiver only": Mutant({"landings": TellsOneReceiver}),
    "waits for one receiver only": Mutant({"landings": WaitsForOneReceiver}),
    "never lets a lease expire": Mutant({"landings": NeverExpires}),
    "lets a lease expire under renewal": Mutant({"receiver": ExpiresUnderRenewal}),
    "does not wait for the acknowledgement": Mutant(
        {"receiver": AwaitsNoAcknowledgement}, cause=REUSED
    ),
    "takes a sender that is silent for dead": Mutant(
        {"receiver": TakesTheSilentForDead}, cause=REUSED
    ),
    "acknowledges while a write is under way": Mutant(
        method=(MemoryWriter, "let_go", _let_go_at_once), cause=REUSED
    ),
    "verifies before the last write": Mutant(method=(MemoryWriter, "_landed", _at_once)),
    "lets a landing have a writer at each receiver": Mutant({"receiver": TellsNobodyOfAClaim}),
    "keeps the blocks of a landing that failed": Mutant({"landings": KeepsWhatFailed}),
    "never lets go of what it reused": Mutant({"landings": ForgetsWhatItReused}),
    "reuses blocks without holding them": Mutant({"reuse": PinsNothing}),
    "evicts blocks that are used": Mutant({"ledger": EvictsWhatIsUsed}),
    "admits twice": Mutant({"receiver": AdmitsTwice}),
    "frees a block twice": Mutant({"ledger": FreesTwice}),
    "leaks the headroom": Mutant({"ledger": LeaksHeadroom}),
    "releases the source before the commit": Mutant({"pushes": ReleasesTheSourceEarly}),
    "keeps a failure to itself": Mutant({"pushes": KeepsFailuresToItself}),
    "forgets to clean": Mutant({"janitor": ForgetsErrands}),
    "digests without place": Mutant(method=(digest, "_places", _without_place)),
    "digests without the landing's key": Mutant(method=(PrefixDigest, "__init__", _without_key)),
    "compares the beginning of a digest": Mutant(method=(Expected, "agrees", _by_its_beginning)),
    "admits what was withdrawn": Mutant(method=(Expected, "settle", _though_withdrawn)),
    "lets a writer leave its landing": Mutant(method=(Expected, "check", _anywhere_in_the_pool)),
}
