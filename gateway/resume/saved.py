"""What a record has of a request: enough to make the same jobs again, and how it ended."""

from __future__ import annotations

from typing import Literal

import msgspec

from backends.protocol import FinishReason, Logprob

Route = Literal["chat", "completion"]


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it came, and what was decided when it came first."""

    id: str
    route: Route
    body: bytes
    created: int
    seed: int
    prompts: tuple[list[int], ...]


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """All tokens of one sequence. `finish` is the worker's: None where a stop string ended it."""

    tokens: list[int]
    finish: FinishReason | None
    logprobs: list[Logprob]


class JobAnswer(msgspec.Struct, frozen=True, array_like=True):
    """How one job ended."""

    lines: tuple[Ended, ...]
    prompt_logprobs: tuple[Logprob, ...]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """How a request ended: its jobs, in order."""

    jobs: tuple[JobAnswer, ...]
