"""Lay a batch of rows out flat, once per step, so that the layer loop does no work per row.

Tokens of all rows form one flat list: first the decode rows, longest context first, then the
prefill chunks. Decode rows are cut into groups of similar length; within a group every row is
padded to the longest, so attention is a handful of calls per group and layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Items

import msgspec
import numpy as np
import torch

from backends.api import Row
from backends.emulation.pool import Indexes, PagedPool

_NEVER = float("-inf")
_SIMILAR = 2
_CACHED_BYTES = 4 << 20
"""On a CPU, groups are kept small enough that what was gathered is still cached when it is read."""


class DecodeGroup(msgspec.Struct, frozen=True):
    """Flat tokens `start` to `end`, one per row: read `runs`, ignore what `mask` forbids.

    `mask` is added to the scores: [row, 1, 1, token].
    """

    start: int
    end: int
    runs: torch.Tensor
    mask: torch.Tensor


class Chunk(msgspec.Struct, frozen=True):
    """Flat tokens `start` to `end` of one prefill row.

    `runs` and `mask` ([token of the chunk, token of the prefix]) are None where the chunk begins
    its prefix: it then attends to nothing but itself.
    """

    row: int
    start: int
    end: int
    blocks: torch.Tensor
    runs: torch.Tensor | None
    mask: torch.Tensor | None


class Plan(msgspec.Struct, frozen=True):
    """One step, ready to run.

    `wanted` are the flat tokens whose hidden states are needed at the end, or None for all of
    them; `places[row]` are their places in the result, in the order of the row's tokens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cells: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    wanted: torch.Tensor | None
    places: tuple[slice, ...]


def make_plan(rows: Items[Row], pool: PagedPool, dtype: torch.dtype, device: str) -> Plan:
    """Plan one step over checked rows. Clears what must be clear in the blocks to be written."""
    decode = [i for i, row in enumerate(rows) if len(row.tokens) == 1]
    decode.sort(key=lambda i: -rows[i].start)
    chunked = [i for i, row in enumerate(rows) if len(row.tokens) > 1]
    order = [rows[i] for i in (*decode, *chunked)]
    positions = np.concatenate([np.arange(r.start, r.start + len(r.tokens)) for r in order])
    blocks = np.concatenate([_blocks_of(row, pool.layout.block_tokens) for row in order])
    wanted, places = _wanted(rows, [*decode, *chunked])
    _begin(order, pool)
    return Plan(
        tokens=torch.tensor([t for row in order for t in row.tokens], device=device),
        positions=torch.from_numpy(positions).to(device),
        cells=_moved(pool.cells_of(blocks, positions % pool.layout.block_tokens), device),
        groups=_groups([rows[i] for i in decode], pool, dtype, device),
        chunks=_chunks(rows, chunked, len(decode), pool, dtype, device),
        wanted=None if len(wanted) == len(positions) else _moved(wanted, device),
        places=places,
    )


def _moved(indexes: Indexes, device: str) -> torch.Tensor:
    return torch.from_numpy(indexes).to(device)


def _blocks_of(row: Row, block_tokens: int) -> Indexes:
    """The block of each of the row's tokens."""
    if len(row.tokens) == 1:
        return np.array([row.blocks[row.start // block_tokens]])
    positions = np.arange(row.start, row.start + len(row.tokens))
    found: Indexes = np.array(row.blocks)[positions // block_tokens]
    return found


def _begin(order: Items[Row], pool: PagedPool) -> None:
    """Only the last block of each row has an end that nobody writes."""
    size = pool.layout.block_tokens
    last = np.array([row.start + len(row.tokens) - 1 for row in order])
    first = np.maximum(np.array([row.start for row in order]), last - last % size)
    blocks = np.array(
        [row.blocks[at // size] for row, at in zip(order, last.tolist(), strict=True)]
    )
    pool.begin(blocks, first % size, last % size)


def _wanted(rows: Items[Row], order: Items[int]) -> tuple[Indexes, tuple[slice, ...]]:
    wanted: list[int] = []
    places = [slice(0, 0)] * len(rows)
    flat = 0
    for i in order:
        row, before = rows[i], len(wanted)
        end = flat + len(row.tokens)
        if row.prompt_logprobs is not None:
            wanted.extend(range(flat, end))
        elif row.sequences:
            wanted.append(end - 1)
        places[i] = slice(before, len(wanted))
        flat = end
    return np.array(wanted, np.int64), tuple(places)


def _groups(
    rows: Items[Row], pool: PagedPool, dtype: torch.dtype, device: str
) -> tuple[DecodeGroup, ...]:
    """Cut rows, longest first, wherever padding would double a row or a group grow too large."""
    size = pool.layout.block_tokens
    block_bytes = pool.layout.block_bytes // pool.layout.layers
    cached = _CACHED_BYTES // block_bytes if device == "cpu" else sys.maxsize
    groups = []
    start = 0
    while start < len(rows):
        longest = rows[start].start // size + 1
        most = min(len(rows), start + max(1, cached // longest))
        end = start + 1
        while end < most and (rows[end].start // size + 1) * _SIMILAR > longest:
            end += 1
        lengths = np.array([row.start + 1 for row in rows[start:end]])
        # a padded place repeats the row's first block: always written, so always finite
        table = np.array([_padded(row, longest, size) for row in rows[start:end]])
        mask = np.where(np.arange(longest * size) < lengths[:, None], 0, _NEVER)
        groups.append(
            DecodeGroup(
                start,
                end,
                _moved(pool.runs_of(table), device),
                torch.from_numpy(mask[:, None, None, :]).to(device, dtype),
            )
        )
        start = end
    return tuple(groups)


def _padded(row: Row, count: int, size: int) -> list[int]:
    used = row.blocks[: row.start // size + 1]
    return used + used[:1] * (count - len(used))


def _chunks(
    rows: Items[Row],
    chunked: Items[int],
    flat: int,
    pool: PagedPool,
    dtype: torch.dtype,
    device: str,
) -> tuple[Chunk, ...]:
    size = pool.layout.block_tokens
    chunks = []
    for i in chunked:
        row, count = rows[i], len(rows[i].tokens)
        table = np.array(row.blocks[: -(-(row.start + count) // size)])
        runs = mask = None
        if row.start:
            runs = _moved(pool.runs_of(table[None]), device)
            ahead = np.arange(len(table) * size) > np.arange(row.start, row.start + count)[:, None]
            mask = torch.from_numpy(np.where(ahead, _NEVER, 0)).to(device, dtype)
        written = _moved(table[row.start // size :], device)
        chunks.append(Chunk(i, flat, flat + count, written, runs, mask))
        flat += count
    return tuple(chunks)
