"""The *engine* contract: the plug-in owns scheduler and memory, as TensorRT-LLM and vLLM do.

KV crosses an *arena*: `pool`, blocks in host memory in the stated layout. The host's ledger owns
them, transports read and write them, digests are taken of them. Whoever computes a prefix copies
its KV from the engine's own memory into the blocks of the job; whoever decodes one copies it from
there. So an engine may do with its own memory what it likes at any time, and the arena need only
be as large as what is on its way: at least one prefix of `context_tokens`.

The life of a job, as the engine tells it (`Events`); what is in brackets depends on the job:

    prefill   job -> [ready ...] prefilled ended
    decode    job -> imported decoded ... ended
    in place  job -> [prefilled] decoded ... ended

`failed` may come at any point before `ended`, and is followed by it. After `abort` the engine may
leave out all but `ended`. Every job that was taken ends with exactly one `ended`.

Threads: the host calls from its event loop's thread, one call at a time, and nothing may block
there: a job is put into a queue, an abort sets a mark. The engine answers from any thread. Events
of one job arrive in the order in which they were called.

Errors: what `prefill`, `decode` raise concerns that job alone, which then was never taken. What
`abort` raises means that nobody knows what becomes of the engine's memory: the worker ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, Protocol

import msgspec

from backends.api.nouns import BackendInfo, Output, Sampled, Sequence


class Job(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Something for the engine to do. Nothing in it changes once it was given.

    `name` is unique for as long as the worker runs; events name the job by it. An engine that keeps
    KV for later prompts keeps it apart by `salt`: KV of one salt is never used under another, and
    with an empty one none is kept or used.
    """

    name: str
    salt: bytes = b""


class PrefillJob(Job, frozen=True, kw_only=True, eq=False):
    """Compute the KV of `tokens`, copy it into the arena, and sample what follows.

    `blocks[i]` of the arena takes the KV of positions `i * block_tokens` onwards, whatever of it
    the engine had already; without blocks nothing is exported. A token is sampled after the last
    position for each of `sequences`, whose `generated` is empty; there are none when that token is
    known already. `prompt_logprobs`, when set, asks for the log probabilities of `tokens[1:]`, with
    that many alternatives.
    """

    tokens: list[int]
    blocks: tuple[int, ...] = ()
    sequences: tuple[Sequence, ...] = ()
    prompt_logprobs: int | None = None


class DecodeJob(Job, frozen=True, kw_only=True, eq=False):
    """Generate the tokens that follow `sequence`, up to `max_tokens` with the earlier ones.

    `blocks` of the arena hold the KV of `context` but for its last token: import that of all of
    them, or of all but the last and compute that one again. Jobs that share a prefix share its
    blocks. Without blocks it is a job in place: the engine computes the whole context itself, and
    goes on. `prompt_logprobs` is asked for only there; see `PrefillJob`.

    The host looks for end tokens, stop tokens and the length by itself, and aborts. An engine that
    ends at one of them on its own says that token first, and never ends at a token that
    `sequence.sampling` does not let it end at.
    """

    sequence: Sequence
    max_tokens: int
    blocks: tuple[int, ...] = ()
    prompt_logprobs: int | None = None

    @property
    def context(self) -> list[int]:
        """All tokens that are known."""
        return self.sequence.prompt + self.sequence.generated

    @property
    def imported_tokens(self) -> int:
        """How many tokens of `context` have their KV in the arena."""
        return len(self.context) - 1 if self.blocks else 0


class Events(Protocol):
    """How an engine answers. Any thread; nothing here blocks or raises.

    What names no job that is open, or comes twice, is logged and has no effect.
    """

    def ready(self, job: str, start: int, end: int, layer: int | None = None) -> None:
        """KV of positions `start` to `end` (exclusive) is in the arena and final.

        In that layer, or in all of them. The host pushes it to another worker while the rest is
        computed. Each layer is told in ascending order without a gap.
        """

    def prefilled(self, job: str, output: Output, cached: int = 0) -> None:
        """The prefix is computed, and the job will not touch its blocks of the arena again.

        `output` has a token for each sequence. The KV of the first `cached` tokens was there
        before. All KV must have been told `ready`: a job that exported less is failed. For a job in
        place this only says when the prompt was done, with no token; it must come, before the first
        token, when `prompt_logprobs` are asked for.
        """

    def imported(self, job: str) -> None:
        """The engine has the KV of a decode job and will not read the arena for it again."""

    def decoded(self, tokens: Items[tuple[str, Sampled]]) -> None:
        """New tokens, by job: one call for each step of the engine, with all that it gave.

        A job that is named several times gave several tokens, in that order.
        """

    def failed(self, job: str, error: Exception) -> None:
        """The engine cannot go on with a job. It is computed again, here or elsewhere.

        `PoolExhausted` says that there was no memory for it.
        """

    def ended(self, job: str) -> None:
        """Nothing of the job is left in the engine: its memory is free, the arena untouched."""

    def died(self, reason: str) -> None:
        """The engine as a whole cannot go on. The worker ends, and is started again."""


class EngineBackend(Protocol):
    """An engine with a scheduler and memory of its own."""

    info: BackendInfo

    pool: Any
    """The arena: writable, C-contiguous, `info.pool_blocks` blocks in the order `info.layout` says.

    As `SteppedBackend.pool`, a list of them where `info.shards` names several. The engine touches
    a block only for a job that names it, between being given that job and `prefilled`, `imported`
    or `ended`.
    """

    def start(self, events: Events) -> None:
        """Begin to work. Called once, before any job; answers go to `events`."""

    def prefill(self, job: PrefillJob) -> None:
        """Take a prefix to compute. Returns at once.

        Raises:
            PoolExhausted: there is no room now.
            BackendError: it cannot be done.
        """

    def decode(self, job: DecodeJob) -> None:
        """Take a sequence to decode. Returns at once.

        Raises:
            PoolExhausted: there is no room now.
            BackendError: it cannot be done.
        """

    def abort(self, job: str) -> None:
        """Do no more for a job. Returns at once; `ended` comes when its memory is free.

        The job may be at any point of its life, over and about to say so, or just ended: then this
        has no effect. An engine that is asked and does not answer within the time of a step counts
        as hung: the worker ends. So does one that has jobs and says nothing at all for that long.
        """

    def pins(self) -> Mapping[str, int]:
        """How many blocks of the engine's own memory each job holds now; called often.

        One that several jobs share counts for each. A job appears here from its first block on, and
        no more once `ended` was said for it.
        """

    def close(self) -> None:
        """Stop, and give the device back. Called once, from another thread; may take its time.

        Jobs may be open; nothing need be said of them. Afterwards the arena is not touched.
        """
