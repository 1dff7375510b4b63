"""An exact backend of a few lines: its text is known, and a wrong page of KV gives another one.

The KV of a position is a state that depends on all tokens up to it; the token sampled there depends
on that state as it lies in the pool, on the seed and on the position.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from backends.api import BackendInfo, Output, Ready, Row, Sampled, Sampling
from backends.api import Sequence as Line
from transfer.layout import KVLayout

BLOCK_TOKENS = 4
VOCABULARY = 50_000
END_TOKENS = tuple(range(100))
CONTEXT_TOKENS = 64
LAYOUT = KVLayout(
    model="tiny",
    weights="float16",
    layers=1,
    kv_heads=1,
    head_dim=4,
    dtype="float16",
    block_tokens=BLOCK_TOKENS,
    rope="half",
    axes="layer block token kv head dim",
)
TOKEN_BYTES = LAYOUT.token_bytes
BLOCK_BYTES = LAYOUT.block_bytes

MASK = (1 << 64) - 1
PLACE = struct.Struct("<QQ")


def follow(state: int, token: int) -> int:
    """The state after one more token."""
    state = (state ^ (token + 1)) * 0x9E3779B97F4A7C15 & MASK
    return state ^ state >> 29


def sampled(state: int, seed: int, position: int) -> int:
    """The token that follows a state."""
    mixed = (state + (seed + 1) * 0xD1342543DE82EF95 + position) * 0xBF58476D1CE4E5B9 & MASK
    return (mixed >> 31) % VOCABULARY


def after(tokens: Sequence[int]) -> int:
    """The state after all of them."""
    state = 0
    for token in tokens:
        state = follow(state, token)
    return state


def pages(tokens: Sequence[int]) -> bytes:
    """What the KV of these tokens looks like, without gaps."""
    state, found = 0, bytearray()
    for token in tokens:
        state = follow(state, token)
        found += PLACE.pack(state, state ^ MASK)
    return bytes(found)


def known_text(prompt: Sequence[int], seed: int, most: int) -> list[int]:
    """What an undisturbed worker says: `most` tokens, fewer when one of them ends it."""
    state, told = after(prompt), []
    for position in range(len(prompt), len(prompt) + most):
        token = sampled(state, seed, position)
        told.append(token)
        if token in END_TOKENS:
            break
        state = follow(state, token)
    return told


class TinyBackend:
    """Fulfils `SteppedBackend`. `wrong` is told of KV that is not that of its tokens."""

    def __init__(
        self,
        blocks: int,
        *,
        computing: Callable[[Sequence[Row]], None],
        wrong: Callable[[str], None],
    ) -> None:
        self.info = BackendInfo(
            layout=LAYOUT,
            pool_blocks=blocks,
            vocabulary=VOCABULARY,
            context_tokens=CONTEXT_TOKENS,
            end_tokens=END_TOKENS,
            rng="positional",
            continuation="exact",
            sampling=frozenset(Sampling.__struct_fields__),
            max_batch=16,
        )
        self.pool: Any = bytearray(blocks * BLOCK_BYTES)
        self._computing = computing
        self._wrong = wrong
        self._right: dict[int, tuple[Line, bytearray]] = {}

    def step(self, batch: Sequence[Row], ready: Ready) -> list[Output]:
        """As `SteppedBackend.step`."""
        self._computing(batch)
        outputs = []
        for number, row in enumerate(batch):
            if len(row.tokens) == 1 and row.start:
                self._check(row)
            state = self._compute(row)
            position = row.start + len(row.tokens)
            outputs.append(
                Output(tuple(Sampled(sampled(state, it.seed, position)) for it in row.sequences))
            )
            if len(row.tokens) > 1:
                ready(number, 0)
        return outputs

    def ingest(self, blocks: Sequence[int]) -> None:
        """As `SteppedBackend.ingest`: nothing to do."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As `SteppedBackend.copy_blocks`."""
        pool = self.pool
        for source, target in pairs:
            where, to = source * BLOCK_BYTES, target * BLOCK_BYTES
            pool[to : to + BLOCK_BYTES] = pool[where : where + BLOCK_BYTES]

    def close(self) -> None:
        """As `SteppedBackend.close`."""

    def _compute(self, row: Row) -> int:
        pool, state = self.pool, 0
        if row.start:
            state = PLACE.unpack_from(pool, place(row.blocks, row.start - 1))[0]
        for position, token in enumerate(row.tokens, row.start):
            state = follow(state, token)
            PLACE.pack_into(pool, place(row.blocks, position), state, state ^ MASK)
        return state

    def _check(self, row: Row) -> None:
        """Everything before this position must be what its tokens say."""
        (line,) = row.sequences
        known = self._right.get(id(line))
        if known is None:
            tokens = [*line.prompt, *line.generated][: row.start]
            known = self._right[id(line)] = line, bytearray(pages(tokens))
        right = known[1]
        size = row.start * TOKEN_BYTES
        while len(right) < size:
            position = len(right) // TOKEN_BYTES
            token = [*line.prompt, *line.generated][position]
            before = PLACE.unpack_from(right, len(right) - TOKEN_BYTES)[0] if right else 0
            state = follow(before, token)
            right += PLACE.pack(state, state ^ MASK)
        for number in range(-(-size // BLOCK_BYTES)):
            at, end = number * BLOCK_BYTES, min(size, (number + 1) * BLOCK_BYTES)
            where = row.blocks[number] * BLOCK_BYTES
            if self.pool[where : where + end - at] != right[at:end]:
                self._wrong(f"block {row.blocks[number]} does not hold what its tokens say")
                return


def place(blocks: Sequence[int], position: int) -> int:
    """Where in the pool the KV of a position lies."""
    block, token = divmod(position, BLOCK_TOKENS)
    return blocks[block] * BLOCK_BYTES + token * TOKEN_BYTES
