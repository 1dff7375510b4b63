"""What the gateway knows of a job while it runs: its sequences and their tokens so far."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

from backends.protocol import Cancel, Disown, FinishReason, FirstToken, Logprob, Token
from gateway.admission import Grant
from gateway.life.history import Record
from gateway.life.job import Job, Listener, Take, Timeline
from gateway.life.states import NEXT, Life, State
from gateway.life.worker import Worker
from gateway.resume import Ended, JobAnswer

if TYPE_CHECKING:
    from gateway.life.leg import Leg


@dataclass(slots=True, eq=False)
class Line:
    """One sequence. `generated` has been given to `take` and is binding.

    `logprobs` and `finish` are noted of a job that may be asked for again.
    """

    index: int
    seed: int
    take: Take
    generated: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    early: dict[int, Token] = field(default_factory=dict)
    ended: bool = False
    paused: bool = False
    leg: Leg | None = None

    def note(self) -> None:
        """From now on, note log probabilities and the finish reason."""
        take = self.take

        def noted(token: int, finish: FinishReason | None, logprob: Logprob | None) -> bool:
            self.finish = finish
            if logprob is not None:
                self.logprobs.append(logprob)
            return take(token, finish, logprob)

        self.take = noted


@dataclass(slots=True, eq=False)
class Run:
    """One job on its way. `keepers` are workers, and the handles under which they keep it."""

    job: Job
    listener: Listener
    lines: tuple[Line, ...]
    timeline: Timeline
    record: Record
    first_token: float | None = None
    prompt_logprobs: tuple[Logprob, ...] = ()
    grant: Grant | None = None
    timer: asyncio.Timeout | None = None
    lives: list[Life] = field(default_factory=list)
    marks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    keepers: list[tuple[Worker, int]] = field(default_factory=list)
    attempts: int = 0

    @classmethod
    def of(cls, job: Job, listener: Listener) -> Run:
        """A run that has not begun."""
        lines = tuple(
            Line(index, seed, listener.sequence(index)) for index, seed in enumerate(job.seeds)
        )
        if job.claim is not None:
            for line in lines:
                line.note()
        timeline = Timeline()
        return cls(job, listener, lines, timeline, Record(job, timeline))

    def begin(self, state: State = State.QUEUED) -> Life:
        """The life of the whole job, or from `State.PLACED` on that of a line gone apart."""
        life = Life(state, self.record.became)
        self.record.became(state)
        self.lives.append(life)
        return life

    def alone(self, life: Life) -> bool:
        """Whether everything else of the job has ended."""
        return all(other is life or not NEXT[other.state] for other in self.lives)

    @property
    def generated_tokens(self) -> int:
        """Of all sequences together."""
        return sum(len(line.generated) for line in self.lines)

    def end(self, state: State) -> State:
        """End badly what has not ended; returns where the first such life was."""
        going_on = [life for life in self.lives if NEXT[life.state]]
        was = going_on[0].state if going_on else State.DONE
        for life in going_on:
            life.become(state)
        return was

    def prefilled(self, message: FirstToken) -> None:
        """Let the next request prefill; note durations; pass the prompt's logprobs on, once."""
        if self.grant is not None:
            self.grant.prefilled()
        if self.timeline.prefill is None:
            self.timeline.prefill_wait = message.wait
            self.timeline.prefill = message.prefill
            self.timeline.cached_tokens = message.cached
        if message.prompt_logprobs:
            self.score_prompt(message.prompt_logprobs)

    def score_prompt(self, logprobs: tuple[Logprob, ...]) -> None:
        """Pass the prompt's log probabilities on, once."""
        if not self.has_prompt_logprobs:
            self.prompt_logprobs = logprobs
            self.listener.prompt_logprobs(logprobs)

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the prompt's log probabilities are known."""
        return bool(self.prompt_logprobs)

    # ---- jobs that may be asked for again

    @property
    def kept(self) -> bool:
        """Whether workers keep it. They do not know a prompt's log probabilities."""
        return self.job.claim is not None and self.job.prompt_logprobs is None

    def next_attempt(self) -> int:
        """The number of one more leg."""
        self.attempts += 1
        return self.attempts

    @property
    def answer(self) -> JobAnswer:
        """How it ended."""
        lines = tuple(Ended(line.generated, line.finish, line.logprobs) for line in self.lines)
        return JobAnswer(lines, self.prompt_logprobs)

    def replay(self, answer: JobAnswer) -> None:
        """Take all of an answer that was made before."""
        if answer.prompt_logprobs:
            self.score_prompt(answer.prompt_logprobs)
        for line, ended in zip(self.lines, answer.lines, strict=True):
            logprobs: Iterable[Logprob | None] = ended.logprobs or repeat(None)
            last = len(ended.tokens) - 1
            for place, (token, logprob) in enumerate(zip(ended.tokens, logprobs, strict=False)):
                line.generated.append(token)
                if line.take(token, ended.finish if place == last else None, logprob):
                    break
            line.ended = True

    def release(self, keepers: list[tuple[Worker, int]], over: bool) -> None:
        """Have workers end what they keep, or keep it for whoever adopts it."""
        for worker, handle in keepers:
            worker.send(Cancel(handle=handle) if over else Disown(handle=handle))
