"""What the gateway knows of a job while it runs: its sequences and their tokens so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backends.protocol import FirstToken, Token
from gateway.admission import Grant
from gateway.life.history import Record
from gateway.life.job import Job, Listener, Take, Timeline
from gateway.life.states import NEXT, Life, State

if TYPE_CHECKING:
    from gateway.life.leg import Leg


@dataclass(slots=True, eq=False)
class Line:
    """One sequence. `generated` has been given to `take` and is binding."""

    index: int
    seed: int
    take: Take
    generated: list[int] = field(default_factory=list)
    early: dict[int, Token] = field(default_factory=dict)
    ended: bool = False
    paused: bool = False
    leg: Leg | None = None


@dataclass(slots=True, eq=False)
class Run:
    """One job on its way."""

    job: Job
    listener: Listener
    lines: tuple[Line, ...]
    timeline: Timeline
    record: Record
    first_token: float | None = None
    has_prompt_logprobs: bool = False
    grant: Grant | None = None
    timer: asyncio.Timeout | None = None
    lives: list[Life] = field(default_factory=list)
    marks: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, listener: Listener) -> Run:
        """A run that has not begun."""
        lines = tuple(
            Line(index, seed, listener.sequence(index)) for index, seed in enumerate(job.seeds)
        )
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
        if message.prompt_logprobs and not self.has_prompt_logprobs:
            self.has_prompt_logprobs = True
            self.listener.prompt_logprobs(message.prompt_logprobs)
