"""Where KV lands that travels as codes: a pool of its own, decoded into the backend's from there.

Late writes of a withdrawn handoff reach this pool alone, so it is its blocks that are quarantined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from backends.api import BackendInfo, allocate
from backends.host.ledger import Ledger
from transfer.coded import decode, decodes_per_second
from transfer.coding import Codec, coded_layout
from transfer.contract import Buffer, Source
from transfer.layout import Landing

SHARE = 4
"""A staging pool has room for this part of what the backend's has, or for the longest prefix."""


class Staging:
    """The pool for one codec, with a ledger of its own."""

    def __init__(self, codec: Codec, info: BackendInfo, pool: Buffer) -> None:
        """Make it, for a backend with one pool.

        Raises:
            LayoutMismatch: there are no such codes for that pool.
        """
        self.codec: Codec = codec
        self.layout = coded_layout(info.layout, codec)
        capacity = info.pool_blocks * info.layout.block_tokens
        tokens = min(capacity, max(info.context_tokens, capacity // SHARE))
        self.ledger = Ledger(self.layout.blocks_for(tokens))
        self.memory = allocate(self.layout.block_bytes * self.ledger.blocks)
        self.decodes_per_second = decodes_per_second(codec, info.layout)
        self._info = info
        self._pool = pool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-decode")

    async def decode(
        self,
        landing: Landing,
        tokens: int,
        blocks: tuple[int, ...],
        unwanted: Callable[[], bool],
    ) -> None:
        """Decode the first `tokens` that were verified in `landing` into `blocks` of the pool.

        Until they are `unwanted`, which is asked in the thread.
        """
        codes = Source(self.layout, self.memory, self.ledger.blocks, landing.blocks, landing.tokens)
        await asyncio.get_running_loop().run_in_executor(
            self._thread,
            decode,
            self.codec,
            codes,
            tokens,
            self._info.layout,
            self._pool,
            self._info.pool_blocks,
            blocks,
            unwanted,
        )

    def close(self) -> None:
        """Decode nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


Stagings = Mapping[Codec, Staging]
