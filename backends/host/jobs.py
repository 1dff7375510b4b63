"""What an engine was given, and how far it has come with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from backends.api import BackendInfo, DecodeJob, Output, PrefillJob, Sampled, Sequence
from backends.errors import PoolExhausted
from backends.host.loop import Item, sound
from backends.host.work import Prefilling, Running


@dataclass(slots=True, eq=False)
class Given:
    """A job that the engine was given, until it says that it has ended.

    `item` is whose job it is: in place, that of the prefix until all its sequences have a token.
    `tokens` wait until they can be told. `exported` positions of each layer are in the arena.
    `release` gives back what `item` holds, when the job has ended. `answer_by` is when it must
    have, once that was asked for. `over`: it has; `why` it could not go on then.
    """

    job: PrefillJob | DecodeJob
    item: Item
    exported: list[int] = field(default_factory=list)
    tokens: deque[Sampled] = field(default_factory=deque)
    prefilled: bool = False
    imported: bool = False
    failed: bool = False
    over: bool = False
    release: Callable[[], None] | None = None
    answer_by: float | None = None
    why: tuple[str, str] = ("engine_failed", "the engine ended it before its last token")

    @property
    def name(self) -> str:
        """What events call it."""
        return self.job.name

    @property
    def tellable(self) -> bool:
        """Whether somebody can take its next token."""
        item = self.item
        free = isinstance(item, Running) and not (item.ended or item.paused)
        return free and bool(self.tokens)

    def next(self) -> tuple[Running, Sampled]:
        """Its next token, and whose it is."""
        assert isinstance(self.item, Running)
        return self.item, self.tokens.popleft()

    def export(self, start: int, end: int, layer: int | None) -> str:
        """Note that these positions are in the arena; what is wrong with that, or nothing."""
        assert isinstance(self.job, PrefillJob)
        layers = range(len(self.exported)) if layer is None else (layer,)
        if layer is not None and not 0 <= layer < len(self.exported):
            return f"layer {layer} was exported, and there is none"
        if not start < end <= len(self.job.tokens):
            return f"positions {start} to {end} of {len(self.job.tokens)} were exported"
        for one in layers:
            if self.exported[one] != start:
                return f"layer {one}: {self.exported[one]} tokens were exported, then from {start}"
            self.exported[one] = end
        return ""

    def objection(self, output: Output, info: BackendInfo) -> str:
        """What is wrong with this result of a prefix, or nothing."""
        assert isinstance(self.job, PrefillJob)
        tokens = len(self.job.tokens)
        if len(output.sampled) != len(self.job.sequences):
            return f"{len(output.sampled)} tokens for {len(self.job.sequences)} sequences"
        if not all(sound(one, info) for one in output.sampled):
            return f"{output.sampled!r:.80} are no tokens"
        if self.job.blocks and min(self.exported) < tokens:
            return f"{min(self.exported)} of {tokens} tokens were exported"
        return ""


def prefill_job(work: Prefilling) -> PrefillJob:
    """The job of a prefix that has its blocks."""
    return PrefillJob(
        name=work.held.name,
        salt=work.spec.salt,
        tokens=work.prefix,
        blocks=tuple(work.blocks),
        sequences=() if work.bound else tuple(_still(one) for one in work.sequences),
        prompt_logprobs=work.spec.prompt_logprobs,
    )


def jobs_in_place(work: Prefilling, max_tokens: int) -> list[DecodeJob]:
    """The jobs of a prefix that is decoded where it is computed. One scores the prompt for all."""
    return [
        DecodeJob(
            name=_line(work.held.name, one.index),
            salt=work.spec.salt,
            sequence=_still(sequence),
            max_tokens=max_tokens,
            prompt_logprobs=work.spec.prompt_logprobs if not number else None,
        )
        for number, (one, sequence) in enumerate(
            zip(work.spec.sequences, work.sequences, strict=True)
        )
    ]


def decode_job(running: Running) -> DecodeJob:
    """The job of a sequence whose prefix has landed."""
    return DecodeJob(
        name=line_of(running),
        salt=running.salt,
        sequence=_still(running.sequence),
        max_tokens=running.max_tokens,
        blocks=tuple(running.blocks),
    )


def line_of(running: Running) -> str:
    """The name of a sequence's job."""
    return _line(running.held.name, running.index)


def cause(error: Exception) -> tuple[str, str]:
    """How the requests call what an engine could not do."""
    code = "preempted" if isinstance(error, PoolExhausted) else "engine_failed"
    return code, f"{type(error).__name__}: {error}"


def _line(held: str, index: int) -> str:
    return f"{held}/{index}"


def _still(sequence: Sequence) -> Sequence:
    """As it is now: the host goes on writing its own."""
    return msgspec.structs.replace(
        sequence, prompt=list(sequence.prompt), generated=list(sequence.generated)
    )
