"""The one file that the author of a backend plug-in reads.

A *stepped* backend computes; the host that runs it owns blocks, batch, cancellation, transfers
and the network. Write one class with the members of `SteppedBackend`, name it under the entry
point group `baton.backends`, and `baton worker --backend NAME` runs it:

    [project.entry-points."baton.backends"]
    acme = "acme_decode:AcmeBackend"

The class is called with the options of `[workers.X.options]` as keyword arguments, in the
worker's process, before anything else happens; it may take its time to load weights.
All other calls come from one thread, the step thread, never two at once.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Literal, Protocol

import msgspec

from backends.errors import BackendError, BackendMisconfigured, BackendNotFound, StepFailed
from transfer.layout import KVLayout, Shard
from transfer.shared_memory import allocate

__all__ = [
    "BackendError",
    "BackendInfo",
    "BackendMisconfigured",
    "BackendNotFound",
    "KVLayout",
    "Logprob",
    "Output",
    "Ready",
    "Row",
    "Sampled",
    "Sampling",
    "Sequence",
    "Shard",
    "StepFailed",
    "SteppedBackend",
    "allocate",
]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Defaults change nothing; temperature 0 is greedy.

    Penalties and bias apply to the logits first, then `min_tokens`, temperature, `top_k`,
    `top_p`, `min_p`. `repetition_penalty` looks at prompt and generated tokens, presence and
    frequency at generated ones only. `logprobs` asks for the log probability of the chosen
    token under the raw logits, and for that many of the likeliest; None asks for neither.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False


_NEUTRAL = Sampling()


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of `token`, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sequence(msgspec.Struct, kw_only=True, eq=False):
    """One line of tokens, as the backend sees it. The host writes it, between steps only.

    The token sampled next has position `len(prompt) + len(generated)`: with `rng` "positional"
    it depends on nothing but the logits, these two lists, `sampling`, `seed` and that position.
    """

    prompt: list[int]
    generated: list[int]
    sampling: Sampling
    seed: int


class Row(msgspec.Struct, kw_only=True, eq=False):
    """One line of a step: compute `tokens` at positions `start`, `start + 1`, ...

    `blocks[i]` holds the KV of positions `i * block_tokens` onwards; the table covers every
    position up to the last one of this row. KV of positions before `start` is there already,
    KV of this row's positions is to be written. One token is a decode row, more a prefill chunk.

    A token is sampled from the logits of the row's last position for each of `sequences`: none
    for a chunk that does not end its prefix, several when sequences share the prefix.
    `prompt_logprobs`, when set, asks for log probabilities of `following` (the token that
    follows each position of this row; one shorter than `tokens` when nothing follows the last),
    with that many alternatives.
    """

    tokens: list[int]
    start: int
    blocks: list[int]
    sequences: tuple[Sequence, ...] = ()
    prompt_logprobs: int | None = None
    following: list[int] = []


class Sampled(msgspec.Struct, frozen=True):
    """A chosen token, and its log probability where that was asked for."""

    token: int
    logprob: Logprob | None = None


class Output(msgspec.Struct, frozen=True):
    """What one row gave: a token for each of its sequences, in order, and prompt logprobs."""

    sampled: tuple[Sampled, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


Ready = Callable[[int, int], None]
"""`ready(row, layer)`: the KV of that row (its index in the batch) is final in that layer.

Calling it lets the host push the layer to another worker while the next one is computed. A
backend without layer hooks never calls it: whatever was not reported is ready when `step`
returns. It may be called from the step thread only.
"""


class BackendInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend states about itself, once, after loading.

    `pool_blocks` is its capacity. `continuation` is "exact" when prefill of prompt and generated
    tokens agrees to the bit with having decoded them, else "equivalent". `rng` is "positional"
    when sampling is a pure function as `Sequence` says, else "engine". `sampling` names the
    fields of `Sampling` that it honours; a request that sets another is placed elsewhere or
    refused. `end_tokens` end a sequence unless `ignore_eos`.

    A backend on several devices, each with a pool for some of the heads, names those heads in
    `shards`, one of them for each pool. `layout` is then that of all heads together, of which each
    pool has its own; a block has the same number in every pool. Nothing is reused across requests.
    """

    layout: KVLayout
    pool_blocks: int
    vocabulary: int
    context_tokens: int
    end_tokens: tuple[int, ...]
    rng: Literal["positional", "engine"]
    continuation: Literal["exact", "equivalent"]
    sampling: frozenset[str]
    max_batch: int = 256
    emulated: bool = False
    shards: tuple[Shard, ...] = ()

    @property
    def layouts(self) -> tuple[KVLayout, ...]:
        """How each pool is cut."""
        return self.layout.sharded(self.shards)

    def unsupported(self, sampling: Sampling) -> list[str]:
        """Fields of `sampling` that change something and that the backend does not honour."""
        return [
            name
            for name in Sampling.__struct_fields__
            if name not in self.sampling and getattr(sampling, name) != getattr(_NEUTRAL, name)
        ]


class SteppedBackend(Protocol):
    """One class, one kernel: the smallest useful plug-in."""

    info: BackendInfo

    pool: Any
    """Writable, C-contiguous buffer of `info.pool_blocks` blocks in the order `info.layout` says.

    Make it with `allocate(bytes)` where the CPU computes or a copy in host memory is kept: a flat
    array of zeroed bytes whose pages are there already, and which workers on the same machine
    write to directly (transport `shm`). A pool that was allocated otherwise works as well, but is
    reached over `tcp` only.

    Where `info.shards` names several pools, this is a list of such buffers, in that order.

    The host reads it to push KV elsewhere and lets other workers write to it, only ever in
    blocks that no row of a running step uses. A device that the CPU cannot address offers a
    buffer in host memory instead: it copies a layer there before it reports it ready, and takes
    blocks from there in `ingest`.
    """

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """Compute every row and return one output per row, in order.

        Blocks until done. An exception means that no row of the batch was computed; the host
        frees them all and goes on with the next step.

        Raises:
            StepFailed: the device could not; the message says why.
        """

    def ingest(self, blocks: Items[int]) -> None:
        """Take note that other workers have written these blocks of `pool`."""

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy KV from the first to the second block of each pair, all layers."""

    def close(self) -> None:
        """Give the device back. Called once, after the last step."""
