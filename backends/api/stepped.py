"""The *stepped* contract: the host owns blocks and batch, the backend computes one step at a time.

All calls come from one thread, the step thread, never two at once; but for `close`, which comes
last, when that thread has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol

import msgspec

from backends.api.nouns import BackendInfo, Output, Sequence


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


Ready = Callable[[int, int], None]
"""`ready(row, layer)`: the KV of that row (its index in the batch) is final in that layer.

Calling it lets the host push the layer to another worker while the next one is computed. A
backend without layer hooks never calls it: whatever was not reported is ready when `step`
returns. It may be called from the step thread only.
"""


class SteppedBackend(Protocol):
    """One class, one kernel: the smallest useful plug-in."""

    info: BackendInfo

    pool: Any
    """Writable, C-contiguous buffer of `info.pool_blocks` blocks in the order `info.layout` says.

    Make it with `allocate(bytes)` where the CPU computes or a copy in host memory is kept: a flat
    array of zeroed bytes whose pages are there already, and which workers on the same machine
    write to directly (transport `shm`). A pool that was allocated otherwise works as well, but is
    reached over `tcp` only.

    Where the layout's axes have a bar, this is a list of such buffers, one for each region; where
    `info.shards` names several pools, a list of those pools, in that order.

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
            StepFailed: the device could not, or a row names a block, a position or a token beyond
                what `info` states; the message says why.
        """

    def ingest(self, blocks: Items[int]) -> None:
        """Take note that other workers have written these blocks of `pool`."""

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy KV from the first to the second block of each pair, all layers."""

    def close(self) -> None:
        """Give the device back. Called once, after the last step."""
