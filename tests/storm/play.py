"""One storm: clients ask without a pause, faults come by their schedule, and all is counted."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.storm.clients import Answer, Ask
from tests.storm.faults import Fate, Fault, schedule
from tests.storm.site import Site

CALM_SECONDS = 120.0
KILL_WINDOW_SECONDS = 0.5
NO_EXCUSE = frozenset({"internal_error"})
"""Codes that stand for a bug, whatever was done to whom."""


class Client(Protocol):
    """Asks one thing at a time. `steady`: it reconnects, and must always get a whole answer."""

    steady: bool

    async def ask(self, ask: Ask) -> Answer:
        """One answer, however it ends; the client has a patience of its own."""


class Judge(Protocol):
    """Says what is wrong with an answer."""

    def __call__(self, ask: Ask, answer: Answer, right: Answer) -> str:
        """Empty when all that it says is right so far, and it is complete if it says so."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a storm goes: a fault each `every` seconds for `seconds`, then at most
    `settle_seconds` until nothing is held any more.
    """

    seed: int
    seconds: float
    every: float = 1.0
    settle_seconds: float = 45.0


@dataclass
class Record:
    """One request in the storm."""

    ask: Ask
    answer: Answer
    steady: bool
    ended: float


@dataclass
class Outcome:
    """What came of a storm. `faults` and `complaints` are for people."""

    plan: Plan
    faults: list[Fault]
    records: list[Record]
    complaints: list[str] = field(default_factory=list)

    def count(self, *, steady: bool) -> Counter[str]:
        """Requests by how they ended: `whole`, `broken`, or the code of an error."""
        return Counter(
            record.answer.code if record.answer.end == "error" else record.answer.end
            for record in self.records
            if record.steady is steady
        )


async def storm(
    site: Site,
    clients: list[Client],
    right: Mapping[Ask, Answer],
    plan: Plan,
    judge: Judge,
) -> Outcome:
    """Let the clients ask while the plan's faults come; look at what is left."""
    fate = Fate(site, schedule(plan.seed, plan.seconds, plan.every))
    records: list[Record] = []
    stop = asyncio.Event()
    questions = random.Random(plan.seed)
    known = list(right)

    async def press(client: Client) -> None:
        while not stop.is_set():
            ask = questions.choice(known)
            answer = await client.ask(ask)
            records.append(Record(ask, answer, client.steady, time.monotonic()))

    async with asyncio.TaskGroup() as tasks:
        for client in clients:
            tasks.create_task(press(client))
        await fate.run()
        stop.set()
    outcome = Outcome(plan, fate.done, records)
    outcome.complaints += _complaints(records, right, fate, judge)
    outcome.complaints += await _left_over(site, plan.settle_seconds)
    return outcome


def _complaints(
    records: list[Record], right: Mapping[Ask, Answer], fate: Fate, judge: Judge
) -> list[str]:
    """What no client may have heard."""
    gateways = [at for at, name in fate.kills if name.startswith("g")]
    found = []
    for record in records:
        answer = record.answer
        detail = judge(record.ask, answer, right[record.ask])
        if detail:
            found.append(f"wrong: {detail} ({record.ask.seed})")
        elif answer.end == "cut":
            found.append(f"cut in silence: {answer}")
        elif answer.code in NO_EXCUSE:
            found.append(f"a bug: {answer.code} {answer.detail}")
        elif record.steady and answer.end != "whole":
            tries = f"{answer.attempts} tries"
            found.append(f"lost: {answer.end} {answer.code} {answer.detail}, {tries}")
        elif answer.end == "broken" and not _excused(record, gateways):
            found.append(f"broken while no gateway was killed: {answer.detail}")
    return found


def _excused(record: Record, kills: list[float]) -> bool:
    began, ended = record.answer.began, record.ended + KILL_WINDOW_SECONDS
    return any(began - KILL_WINDOW_SECONDS <= at <= ended for at in kills)


async def _left_over(site: Site, settle_seconds: float) -> list[str]:
    """What does not balance when the storm is over."""
    complaints = site.bugs()
    try:
        await site.ready(CALM_SECONDS)
        await site.balanced(settle_seconds)
    except AssertionError as error:
        complaints.append(str(error))
    immortal = await site.immortal_keys()
    if immortal:
        complaints.append(f"keys without a lifetime: {immortal}")
    return complaints


def table(outcome: Outcome) -> str:
    """The outcome, for people."""
    plan = outcome.plan
    rows = [f"seed {plan.seed}, {plan.seconds:.0f} s, a fault each {plan.every:.0f} s", ""]
    rows += ["| target | kill | stop |", "|---|---|---|"]
    for target in sorted({fault.target for fault in outcome.faults}):
        kinds = Counter(fault.kind for fault in outcome.faults if fault.target == target)
        rows.append(f"| {target} | {kinds['kill']} | {kinds['stop']} |")
    head = ["clients", "requests", "whole", "tries", "resumed", "wrong", "cut", "longest pause, s"]
    rows += ["", f"| {' | '.join(head)} | ended otherwise |", "|---" * (len(head) + 1) + "|"]
    for steady, name in ((True, "reconnecting"), (False, "ordinary")):
        rows.append(_row(outcome, name, steady=steady))
    rows += ["", f"complaints: {len(outcome.complaints)}"]
    rows += [f"- {complaint[:2000]}" for complaint in outcome.complaints[:20]]
    return "\n".join(rows)


def _row(outcome: Outcome, name: str, *, steady: bool) -> str:
    answers = [record.answer for record in outcome.records if record.steady is steady]
    ends = outcome.count(steady=steady)
    otherwise = ", ".join(f"{n} {end}" for end, n in ends.items() if end not in ("whole", "cut"))
    cells: list[Any] = [
        name,
        len(answers),
        ends["whole"],
        sum(answer.attempts for answer in answers),
        sum(answer.resumed for answer in answers),
        sum(complaint.startswith("wrong") for complaint in outcome.complaints),
        ends["cut"],
        f"{max((answer.longest_pause for answer in answers), default=0):.1f}",
        otherwise or "none",
    ]
    return f"| {' | '.join(map(str, cells))} |"
