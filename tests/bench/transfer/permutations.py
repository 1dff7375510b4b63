"""The same permutation by whoever is good at it, all within one process and on one core.

numpy and torch each try two ways, block by block and all blocks at once, and keep the faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.transfer.cases import Case
from tests.bench.transfer.idle import Idle
from tests.bench.transfer.memory import source_pool, target_pool
from transfer.contract import Source, whole
from transfer.convert import Conversion
from transfer.layout import Epoch, KVLayout, Landing
from transfer.plan import plan
from transfer.pool import Pool

Receiver = Idle
Way = Callable[[], None]


class Sender:
    """Moves the prefix from one pool to another, axes and block size changed on the way."""

    def __init__(self, case: Case, *, by: str) -> None:
        if not case.permuted or case.tokens % case.source.block_tokens:
            raise ValueError(f"case: {case.name} is no permutation of whole blocks")
        torch.set_num_threads(1)
        self._case = case
        self._source = source_pool(case, case.source)
        self._target = target_pool(case, case.target)
        self._here = _shaped(self._source, case.source, case.pool_blocks(case.source))
        self._there = _shaped(self._target, case.target, case.pool_blocks(case.target))
        ways = [self._baton()] if by == "baton" else self._library(by)
        self._fastest = min(ways, key=_seconds_of)

    async def offer(self) -> None:
        """Look whether all of it is where it belongs."""
        order = _order(self._case.source, self._case.target)
        for index, (block, first, target) in enumerate(self._pieces()):
            wanted = self._here[:, :, block, first : first + 16].transpose(order)
            if not (self._there[target] == wanted).all():
                raise AssertionError(f"block {index} holds something else")

    async def meet(self, told: None) -> None:
        """Nobody to meet."""

    async def send(self, told: None, count: int) -> list[float]:
        return [_seconds_of(self._fastest) for _ in range(count)]

    def _pieces(self) -> list[tuple[int, int, int]]:
        """Of each target block: its source block, the first token there, and its own number."""
        per_block = self._case.source.block_tokens // 16
        return [
            (self._case.source_blocks[index // per_block], index % per_block * 16, target)
            for index, target in enumerate(self._case.target_blocks)
        ]

    def _library(self, by: str) -> list[Way]:
        case, pieces = self._case, self._pieces()
        layers, _, _, _, heads, dim = self._here.shape
        arrays = (
            self._here.view(np.int16),
            self._there.view(np.int16),
            np.array(case.source_blocks),
            np.array(case.target_blocks),
        )
        here, there, sources, targets = map(torch.from_numpy, arrays) if by == "torch" else arrays
        order = _order(case.source, case.target)
        words = case.source.axes.split()
        whole_order = [words.index(axis) for axis in case.target.axes.split()]

        def block_by_block() -> None:
            for block, first, target in pieces:
                part = here[:, :, block, first : first + 16]
                there[target] = _permuted(part, order)

        def at_once() -> None:
            chosen = here[:, :, sources].reshape(layers, 2, len(pieces), 16, heads, dim)
            there[targets] = _permuted(chosen, whole_order)

        return [block_by_block, at_once]

    def _baton(self) -> Way:
        case = self._case
        source = Source(
            case.source,
            self._source,
            case.pool_blocks(case.source),
            case.source_blocks,
            case.tokens,
        )
        landing = Landing(
            id="bench",
            epoch=Epoch(1, 1),
            secret=b"",
            worker="bench",
            endpoints=(),
            layout=case.target,
            pool_blocks=case.pool_blocks(case.target),
            blocks=case.target_blocks,
            tokens=case.tokens,
            lease_seconds=60.0,
        )

        pool = Pool.of(case.target, landing.pool_blocks, self._target)

        def convert() -> None:
            conversion = Conversion(plan(case.source, case.target), source, landing)
            for part in whole(case.shape.layers, case.tokens):
                conversion.write(part, pool)

        return convert


def _seconds_of(way: Way) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _shaped(pool: NDArray[np.uint8], layout: KVLayout, blocks: int) -> NDArray[np.uint16]:
    return pool.view(np.uint16).reshape(tuple(layout.sizes(blocks).values()))


def _order(source: KVLayout, target: KVLayout) -> list[int]:
    """How the axes of one block are permuted."""
    words = [axis for axis in source.axes.split() if axis != "block"]
    return [words.index(axis) for axis in target.axes.split() if axis != "block"]


def _permuted(array: Any, order: list[int]) -> Any:
    return array.permute(order) if isinstance(array, torch.Tensor) else array.transpose(order)
