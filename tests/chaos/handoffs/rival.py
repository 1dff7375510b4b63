"""A second worker that was given the same landing and the same prefix, and writes it too.

So it goes when a gateway gives a prefill to somebody else because the first one seemed lost: both
know the right, both are honest, and only one of them may write.
"""

from __future__ import annotations

import asyncio
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from backends.host.handoff import encode_note
from tests.chaos.handoffs import truth
from tests.chaos.handoffs.plot import COMMIT_SECONDS
from transfer.contract import Source, whole
from transfer.errors import PeerLost, TransferError
from transfer.layout import Landing
from transfer.memory import MemoryWriter

if TYPE_CHECKING:
    from tests.chaos.handoffs.game import Game
    from tests.chaos.handoffs.handoff import Handoff
    from tests.chaos.handoffs.workers import Prefill


class Rival:
    """The other worker's end of one handoff. It dies, stops and stalls with that worker."""

    def __init__(self, game: Game, worker: Prefill, handoff: Handoff, landing: Landing) -> None:
        self.handoff = handoff
        self._game = game
        self._worker = worker
        self._landing = landing
        self._writer: MemoryWriter | None = None
        self._lost = False

    async def run(self) -> None:
        """Open, write, commit, abort, as far as it is let."""
        game, handoff = self._game, self.handoff
        try:
            sender = self._worker.sender.inner
            self._writer = await sender.open(self._landing, complete(handoff.prompt))
            if self._writer.holds(self._landing.id):
                game.tell(f"{handoff}: {self._worker} was quicker")
                game.rivals[self._writer] = self._worker
                handoff.outrun = True
            for part in whole(truth.SOURCE.layers, truth.tokens_of(handoff.prompt)):
                await self._pause()
                await self._writer.write(part)
            await self._pause()
            await self._writer.commit(encode_note(handoff.firsts), COMMIT_SECONDS)
        except (TransferError, TimeoutError):
            pass
        if self._writer is not None and not self._lost:
            await self._writer.abort()

    def break_off(self) -> None:
        """Its line breaks, or its process is dead; sooner or later the other end hears of it."""
        self._lost = True
        self._game.later(self.handoff.latency("loss", 0.4), self._peer_gone)

    def _peer_gone(self) -> None:
        if self._writer is not None:
            self._writer.lose(PeerLost("the connection broke"))

    async def _pause(self) -> None:
        """Take a while, and as long as the worker stands still.

        Raises:
            PeerLost: it has no line any more.
        """
        await asyncio.sleep(self.handoff.latency("rival", 0.02))
        while self._worker.stopped_until > self._game.now and not self._worker.dead:
            await asyncio.sleep(self._worker.stopped_until - self._game.now)
        if self._lost or self._worker.dead:
            raise PeerLost("the connection broke")


@cache
def complete(prompt: int) -> Source:
    """A pool with all of a prompt's KV."""
    tokens = truth.tokens_of(prompt)
    blocks = tuple(range(truth.SOURCE.blocks_for(tokens)))
    pool = np.zeros(len(blocks) * truth.SOURCE.block_bytes, dtype=np.uint8)
    table = truth.table(pool, truth.SOURCE, len(blocks))
    where = truth.places(blocks, tokens, truth.SOURCE.block_tokens)
    table[where] = truth.kv_of(prompt).view(np.uint32)
    return Source(truth.SOURCE, pool, len(blocks), blocks, tokens)
