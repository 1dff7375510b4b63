"""Which KV a request finds here already, and what of it stays for later ones.

Every full block that was computed or admitted is kept (`prefixes.py`), under a link that has the
request's salt in it: nothing is found under another. Blocks are looked at twice, in threads of
their own, for about as long as it takes to read their memory: once when they are kept, unless the
handoff that brought them has done so, and again each time they are reused. For a prefix that is
computed here that is before the rest of it is; for a landing it is at the commit, by the receiver.

Where a device has a memory of its own it is the copy in the host's memory that is looked at; the
device takes that copy again when a landing is admitted.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import structlog

from backends.api import BackendInfo
from backends.chain import chain
from backends.host.ledger import Holder, Ledger
from backends.host.prefixes import Kept, Prefixes
from transfer.contract import Buffer, Proof
from transfer.digest import changed, prove

log = structlog.get_logger()

Wanted = Literal["auto", "on", "off"]


class Reuse:
    """The kept blocks of one worker. `news` is called when what others may find has changed."""

    def __init__(
        self,
        wanted: Wanted,
        info: BackendInfo,
        pool: Buffer,
        ledger: Ledger,
        news: Callable[[], None],
    ) -> None:
        self.enabled = _enabled(wanted, info)
        self.prefixes = Prefixes(ledger, news)
        self._layout = info.layout
        self._pool = pool
        self._pool_blocks = info.pool_blocks
        self._ledger = ledger
        self._key = secrets.token_bytes(16)
        # Whoever waits for a look at kept blocks does not wait for new ones to be looked at.
        self._prover = ThreadPoolExecutor(1, thread_name_prefix="prove")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="check")

    def close(self) -> None:
        """Look at nothing more."""
        for thread in (self._prover, self._checker):
            thread.shutdown(wait=False, cancel_futures=True)

    def links(self, salt: bytes, tokens: Sequence[int]) -> list[bytes]:
        """The links of a prefix; none where nothing is reused."""
        return chain(self._layout, salt, tokens) if self.enabled and salt else []

    def share(self, links: Sequence[bytes], most: int, holder: Holder) -> list[Kept]:
        """Have `holder` hold what is kept of a prefix's beginning, at most so many blocks."""
        found = self.prefixes.find(links, max(0, most))
        self._ledger.share([it.block for it in found], holder)
        return found

    def keep(
        self, links: Sequence[bytes], blocks: Sequence[int], proofs: Sequence[Proof] = ()
    ) -> None:
        """Keep the blocks of a prefix, which are final and held; see `Prefixes.keep`."""
        unproven = self.prefixes.keep(links, blocks, proofs)
        if not unproven:
            return
        first, end = unproven[0].place, unproven[-1].place + 1
        look = partial(
            prove,
            self._layout,
            self._pool,
            self._pool_blocks,
            tuple(blocks[:end]),
            first,
            self._key,
        )
        proving = asyncio.get_running_loop().run_in_executor(self._prover, look)
        proving.add_done_callback(partial(self._proven, unproven))

    def check(self, kept: Sequence[Kept], told: Callable[[bool], None]) -> None:
        """Look again at what was found; `told` hears whether all is as it was.

        What has changed is forgotten before that.
        """
        look = partial(
            changed,
            self._layout,
            self._pool,
            self._pool_blocks,
            tuple(it.block for it in kept),
            [it.proof for it in kept if it.proof is not None],
        )
        checking = asyncio.get_running_loop().run_in_executor(self._checker, look)
        checking.add_done_callback(partial(self._checked, kept, told))

    def forget(self, kept: Sequence[Kept]) -> None:
        """These blocks do not hold what they are kept as."""
        if kept:
            log.error("prefix.corrupted", blocks=len(kept), first=kept[0].block)
            self.prefixes.forget(kept)

    def forget_blocks(self, blocks: Sequence[int]) -> None:
        """A step that used these blocks has failed: nobody knows what the device did to them."""
        self.prefixes.forget_blocks(blocks)

    def _proven(self, unproven: list[Kept], proving: asyncio.Future[list[Proof]]) -> None:
        if proving.cancelled():
            return
        if isinstance(proving.exception(), MemoryError):
            self.prefixes.forget(unproven)
            return
        proofs = proving.result()
        for entry in unproven:
            self.prefixes.prove(entry, proofs[entry.place - unproven[0].place])

    def _checked(
        self,
        kept: Sequence[Kept],
        told: Callable[[bool], None],
        checking: asyncio.Future[int | None],
    ) -> None:
        if checking.cancelled():
            return
        no_memory = isinstance(checking.exception(), MemoryError)
        first = 0 if no_memory else checking.result()
        if first is not None:
            self.forget(kept[first:])
        told(first is None)


def _enabled(wanted: Wanted, info: BackendInfo) -> bool:
    """Whether blocks are kept: by default where that changes no text.

    Never where a layer keeps only the last tokens: what a block lacks then depends on how long the
    prefix was. Nor over several pools, of which a proof would have to speak together, nor in the
    arena of an engine, which keeps what it likes by itself.
    """
    if info.layout.windows or info.shards or info.kind == "engine" or wanted == "off":
        return False
    exact = info.continuation == "exact" or info.layout.dtype == "float32"
    return wanted == "on" or exact
