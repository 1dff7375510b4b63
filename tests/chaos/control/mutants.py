"""Versions of the control plane that each break one promise: what the checks are worth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from backends.host import WorkerHost
from backends.host.janitor import Janitor
from backends.host.landings import Landings as HostLandings
from backends.host.ledger import Holder, Ledger
from backends.host.requests import Requests
from backends.host.reuse import Reuse
from backends.host.steps import StepLoop
from backends.protocol import Cancel
from gateway.admission.queue import Admission
from gateway.admission.scripts import SCRIPTS, script
from gateway.life.breakers import Breaker
from gateway.life.fleet import Fleet
from gateway.life.leg import Leg
from gateway.life.worker import Worker
from tests.chaos.control.game import Control, Parts
from transfer.landings import Expected, Landings


class Mutant(msgspec.Struct, frozen=True):
    """One method exchanged, as (class, name, replacement), or one text in the scripts.

    `cause` is what the checks must say when they catch it.
    """

    method: tuple[Any, str, Any] | None = None
    lua: tuple[str, str] | None = None
    cause: str = ""

    @contextlib.contextmanager
    def played(self) -> Iterator[Control]:
        """The scenario with this mutant in it."""
        if self.lua is not None:
            sources = [script(name).source for name in SCRIPTS]
            assert any(self.lua[0] in source for source in sources), "the mutant is out of date"
        scenario = Control(Parts(lua=self.lua))
        if self.method is None:
            yield scenario
            return
        owner, name, replacement = self.method
        true = owner.__dict__[name]
        setattr(owner, name, replacement)
        try:
            yield scenario
        finally:
            setattr(owner, name, true)


def _around(owner: Any, name: str, make: Callable[[Any], Any]) -> tuple[Any, str, Any]:
    """The method, made another by what calls it."""
    return owner, name, make(owner.__dict__[name])


# ---- workers


def _without_quarantine(withdraw: Any) -> Any:
    def withdrawn(landings: HostLandings, landing_id: str) -> None:
        withdraw(landings, landing_id)
        for holder in [it for it in landings._ledger._held if it.reason == "quarantine"]:
            landings._ledger.release(holder)

    return withdrawn


def _any_epoch(claim: Any) -> Any:
    def claimed(book: Landings, landing_id: str, epoch: Any, *rest: Any) -> Expected:
        entry = book._book.get(landing_id)
        accepted: Expected = claim(book, landing_id, entry.landing.epoch if entry else epoch, *rest)
        return accepted

    return claimed


def _unverified(settle: Any) -> Any:
    def settled(entry: Expected, found: Any, *rest: Any) -> bytes:
        answer: bytes = settle(entry, None, *rest)
        return answer

    return settled


def _leaks(reason: str) -> Any:
    release = Ledger.__dict__["release"]

    def released(ledger: Ledger, holder: Holder) -> int:
        freed: int = 0 if holder.reason == reason else release(ledger, holder)
        return freed

    return Ledger, "release", released


def _though_busy(end: Any) -> Any:
    def ended(loop: StepLoop, item: Any, release: Any) -> None:
        busy, item.busy = item.busy, False
        end(loop, item, release)
        item.busy = busy

    return ended


async def _at_once(host: WorkerHost) -> None:
    """Told to drain, it leaves."""


def _unseen(reuse: Reuse, kept: Any, told: Callable[[bool], None]) -> None:
    """Whatever is kept is taken for what it was."""
    told(True)


def _in_silence(loop: StepLoop, running: Any) -> bool:
    """The preempted sequence is dropped, and nobody hears of it."""
    outcome = loop._outcome

    class Mute:
        def lost(self, item: Any, code: str, detail: str) -> None:
            outcome._drop_running(item)

    loop._outcome = Mute()  # type: ignore[assignment]
    try:
        grown: bool = _grow(loop, running)
    finally:
        loop._outcome = outcome
    return grown


_grow = StepLoop.__dict__["_grow"]


# ---- gateways


def _without_cancel(send: Any) -> Any:
    def sent(worker: Worker, message: Any) -> None:
        if not isinstance(message, Cancel):
            send(worker, message)

    return sent


def _in_arrival_order(leg: Leg, row: Any) -> None:
    """Takes whatever comes as the next one."""
    line = leg._lines.get(row.index)
    if line is not None and not line.ended:
        leg._accept(line, row)


def _without_early(token: Any) -> Any:
    def taken(leg: Leg, row: Any) -> None:
        line = leg._lines.get(row.index)
        if line is None or row.position <= len(line.generated):
            token(leg, row)

    return taken


def _resampled(spec: Any) -> Any:
    """A retry continues from all tokens but the last, and draws that anew."""

    def specified(leg: Leg) -> Any:
        made = spec(leg)
        sequences = tuple(
            msgspec.structs.replace(it, generated=it.generated[:-1], seed=it.seed + 1)
            if it.generated
            else it
            for it in made.sequences
        )
        return msgspec.structs.replace(made, sequences=sequences)

    return specified


def _never_lost(fleet: Fleet, worker: Any, reason: str) -> None:
    """Nobody tells the legs that their worker is gone."""
    legs, worker.legs = worker.legs, {}
    _lose(fleet, worker, reason)
    worker.legs = legs


_lose = Fleet.__dict__["_lose"]


def _keeps_its_lease(run: Any) -> Any:
    """What is over is never given back."""

    async def running(admission: Admission) -> None:
        put = admission._leaving.put_nowait
        admission._leaving.put_nowait = lambda left: put(left) if left.epoch else None
        await run(admission)

    return running


MUTANTS = {
    "skips the quarantine": Mutant(_around(HostLandings, "withdraw", _without_quarantine)),
    "accepts a stale epoch": Mutant(_around(Landings, "claim", _any_epoch)),
    "admits without a look at the digest": Mutant(_around(Expected, "settle", _unverified)),
    "leaks the headroom": Mutant(_leaks("headroom")),
    "leaks the source": Mutant(_leaks("prefill")),
    "frees blocks that a step uses": Mutant(_around(StepLoop, "end", _though_busy)),
    "reuses what it has not looked at": Mutant((Reuse, "check", _unseen)),
    "drains and gives nothing back": Mutant(
        (WorkerHost, "_wind_down", _at_once), cause="has drained"
    ),
    "goes where a breaker is open": Mutant(
        (Breaker, "admits", lambda breaker, now: True), cause="left alone"
    ),
    "preempts in silence": Mutant((StepLoop, "_grow", _in_silence)),
    "forgets to clean": Mutant((Janitor, "hand", lambda janitor, errand: None)),
    "keeps what a lost gateway held": Mutant((Requests, "lose", lambda requests, link: None)),
    "loses a cancel": Mutant(_around(Worker, "send", _without_cancel)),
    "takes tokens as they come": Mutant((Leg, "token", _in_arrival_order)),
    "drops early tokens": Mutant(_around(Leg, "token", _without_early)),
    "resamples a sent token": Mutant(_around(Leg, "_spec", _resampled)),
    "tells no leg of a lost worker": Mutant((Fleet, "_lose", _never_lost)),
    "forgets to give the lease back": Mutant(_around(Admission, "run", _keeps_its_lease)),
    "reaps too early": Mutant(
        lua=("leases, '-inf', now, 'LIMIT'", "leases, '-inf', now + lease, 'LIMIT'")
    ),
    "never reaps": Mutant(lua=("leases, '-inf', now, 'LIMIT'", "leases, '-inf', 0, 'LIMIT'")),
    "grants twice": Mutant(
        lua=(
            "      serve(id, ticket)\n      let_in(id",
            "      clock(ticket.band)\n      let_in(id",
        )
    ),
    "settles twice": Mutant(
        lua=("    ticket.prefill, ticket.claim = 0, 0\n", "    ticket.prefill = 0\n")
    ),
    "grants what has no room": Mutant(
        lua=("elseif not fits(ticket) then", "elseif book.staffed == 0 then")
    ),
    "lets keys live for ever": Mutant(
        lua=("redis.call('PEXPIRE', key, lifetime)", "redis.call('EXISTS', key)")
    ),
    "gives a right away without a new epoch": Mutant(
        lua=("hold(id, ticket, next_epoch())", "hold(id, ticket, ticket.epoch)")
    ),
}
