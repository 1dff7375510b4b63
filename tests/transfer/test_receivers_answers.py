"""Whatever a receiver says of a handoff, in whatever order and however often: it ends once."""

import asyncio
import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import KVSlice, Source
from transfer.errors import DigestMismatch, LandingGone, PeerLost, PeerMisbehaved
from transfer.memory import MemoryNetwork, MemoryReceiver
from transfer.plan import plan
from transfer.session import wire
from transfer.session.writing import SessionWriter
from transfer.stage import SOURCE, SOURCE_BLOCKS, TARGET, TOKENS, Pair, Stage

ANSWERS = {
    "landed": wire.Answer(0, "landed", answer=b"first"),
    "landed otherwise": wire.Answer(0, "landed", answer=b"second"),
    "mismatch": wire.Answer(0, "mismatch", "it holds something else"),
    "gone": wire.Answer(0, "gone", "it was withdrawn"),
}
SAYINGS = (*ANSWERS, "granted", "lost", "turn")
ERRORS = {"mismatch": DigestMismatch, "gone": LandingGone, "lost": PeerLost}


class Line:
    """A session and its mover: the thread has its turns when the test says so."""

    digest = False
    stall_seconds = 5.0
    next_ticket = 0
    waits_for_grant = False

    def __init__(self):
        self.mover, self.backlog = self, self
        self.broken = False
        self.jobs, self.sent, self.left, self.log = [], [], [], []

    # as a session
    def enter(self, listener):
        self.listener = listener

    def leave(self, ticket):
        self.left.append(ticket)

    def send(self, message):
        self.sent.append(message)

    def submit(self, job):
        self.jobs.append(job)

    def call_soon(self, what, *arguments):
        what(*arguments)

    async def take(self, amount):
        pass

    def give(self, amount):
        pass

    # as a mover and a move
    def begin(self, outgoing):
        return self

    def write(self, part):
        self.log.append("write")

    def flush(self):
        pass

    def settle(self):
        return b""

    def release(self):
        self.log.append("release")

    # as the test
    def turn(self):
        while self.jobs:
            self.jobs.pop(0)()

    def say(self, what):
        if what == "turn":
            self.turn()
        elif what == "granted":
            self.listener.granted()
        elif what == "lost":
            self.listener.lost(PeerLost("cut"))
        else:
            self.listener.answered(ANSWERS[what])


def begun(kind=SessionWriter):
    line = Line()
    pool = np.zeros(SOURCE_BLOCKS * SOURCE.block_bytes, np.uint8)
    source = Source(SOURCE, pool, SOURCE_BLOCKS, (5, 6, 1, 3), TOKENS)
    landing = Stage(Pair(None, MemoryReceiver(MemoryNetwork(), TARGET))).landing
    return line, kind(line, plan(SOURCE, TARGET), landing, source, None, None)


async def told(kind, before, after):
    """How a commit ends that is made between what is said before and after it; and the line."""
    line, writer = begun(kind)
    for what in before:
        line.say(what)
    with contextlib.suppress(LandingGone, PeerLost, PeerMisbehaved):
        await writer.write(KVSlice(0, 0, TOKENS))
    committing = asyncio.ensure_future(writer.commit(b"note", PATIENCE_SECONDS))
    await asyncio.sleep(0)
    for what in after:
        line.say(what)
        await asyncio.sleep(0)
    line.say("lost")
    [outcome] = await asyncio.gather(committing, return_exceptions=True)
    aborting = asyncio.ensure_future(writer.abort())
    await asyncio.sleep(0)
    line.turn()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await aborting
    return outcome, line


def ends_once(kind, before, after):
    outcome, line = asyncio.run(told(kind, before, after))
    assert line.log.count("release") == 1
    assert line.log[-1] == "release", "it wrote after it had said that it does not"
    assert line.left == [0]
    assert sum(isinstance(it, wire.Released) for it in line.sent) == 1
    early = [it for it in before if it not in ("granted", "turn")]
    if early:  # an answer to a commit that was not sent is a fault of the receiver's
        wanted = ERRORS[early[0]] if early[0] in ("gone", "lost") else PeerMisbehaved
        assert type(outcome) is wanted
        return
    first = next((it for it in after if it not in ("granted", "turn")), "lost")
    if first in ERRORS:
        assert type(outcome) is ERRORS[first]
    else:
        assert outcome.answer == ANSWERS[first].answer


sayings = some.lists(some.sampled_from(SAYINGS), max_size=6)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(sayings, sayings)
def test_a_handoff_ends_once_and_as_the_first_answer_says(before, after):
    ends_once(SessionWriter, before, after)


class ReleasesAtEachAnswer(SessionWriter):
    def _release(self):
        self._releasing = False
        super()._release()


class MindsASecondAnswer(SessionWriter):
    def answered(self, answer):
        self._answer.set_result(answer)
        self._release()


class TakesAnAnswerForACommit(SessionWriter):
    def answered(self, answer):
        self._committed = True
        super().answered(answer)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (ReleasesAtEachAnswer, [], ["landed", "turn", "landed"]),
        (MindsASecondAnswer, [], ["landed", "landed otherwise"]),
        (TakesAnAnswerForACommit, ["landed"], []),
    ],
    ids=lambda it: getattr(it, "__name__", None),
)
def test_writers_that_mind_a_second_answer_are_found_out(kind, before, after):
    with pytest.raises((AssertionError, asyncio.InvalidStateError)):
        ends_once(kind, before, after)
