"""Carry a prefix from one backend's pool into another's, over a real transport and its digest."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence as Items
from contextlib import AsyncExitStack
from typing import Any, Protocol

import msgspec

from backends.api import BackendInfo
from backends.host.pools import pools_of
from backends.testing.form import Broken
from transfer.contract import Source, whole
from transfer.errors import LayoutMismatch, TransferError
from transfer.layout import Epoch, KVLayout, Landing
from transfer.plan import plan
from transfer.sharded import ShardedWriter, parts_of, pieces
from transfer.tcp import TcpReceiver, TcpSender

COMMIT_SECONDS = 30.0


class Holder(Protocol):
    """What has a pool: a backend, or memory that stands for another worker's."""

    info: BackendInfo
    pool: Any


class Stated:
    """The pool of `holder`, said to be cut as `layout`; or a pool of zeros that is."""

    def __init__(self, holder: Holder, layout: KVLayout, *, fresh: bool = False) -> None:
        """Where it is `fresh`, it holds at least as many tokens as that of `holder`."""
        tokens = holder.info.pool_blocks * holder.info.layout.block_tokens
        blocks = layout.blocks_for(tokens) if fresh else holder.info.pool_blocks
        shards = () if fresh else holder.info.shards
        self.info = msgspec.structs.replace(
            holder.info, layout=layout, pool_blocks=blocks, shards=shards
        )
        self.pool = bytearray(layout.block_bytes * blocks) if fresh else holder.pool


def carry(
    source: Holder,
    blocks: Items[int],
    target: Holder,
    landing_blocks: Items[int],
    tokens: int,
) -> None:
    """Hand the KV of `tokens` tokens over, from `blocks` there into `landing_blocks` here.

    Unlike weights are allowed. The target is not told; `ingest` is the caller's.

    Raises:
        LayoutMismatch: the stated layouts cannot be converted.
        Broken: the pool does not hold what was written to it.
    """
    asyncio.run(_carry(source, tuple(blocks), target, tuple(landing_blocks), tokens))


async def _carry(
    source: Holder,
    blocks: tuple[int, ...],
    target: Holder,
    landing_blocks: tuple[int, ...],
    tokens: int,
) -> None:
    ours, theirs = pools_of(source.info, source.pool), pools_of(target.info, target.pool)
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(TcpReceiver(it.layout)) for it in theirs]
        for number, receiver in enumerate(receivers):
            receiver.shard = number
            receiver.allow_unlike_weights = True
        sender = await stack.enter_async_context(TcpSender(allow_unlike_weights=True))
        landing = Landing(
            id="kit",
            epoch=Epoch(1, 1),
            secret=secrets.token_bytes(16),
            worker="kit",
            endpoints=tuple(it.endpoint for it in receivers),
            layout=target.info.layout,
            pool_blocks=target.info.pool_blocks,
            blocks=landing_blocks,
            tokens=tokens,
            lease_seconds=COMMIT_SECONDS,
            parts=parts_of([it.layout.heads for it in ours], [it.layout for it in theirs]),
        )
        writer = ShardedWriter()
        stack.push_async_callback(writer.abort)
        for piece in pieces(landing):
            receivers[piece.target].expect(
                piece.landing,
                theirs[piece.target].memory,
                touched=lambda: None,
                arrived=lambda _: b"",
                failed=lambda _: None,
            )
            mine = ours[piece.source]
            prefix = Source(mine.layout, mine.memory, source.info.pool_blocks, blocks, tokens)
            await writer.open(sender, piece.landing, prefix)
        try:
            for part in whole(source.info.layout.layers, tokens):
                await writer.write(part)
            await writer.commit(b"", COMMIT_SECONDS)
        except LayoutMismatch:
            raise
        except TransferError as error:
            raise Broken(
                f"handoff: {error}; is the pool written to by somebody else meanwhile, or does the "
                "layout name places that lie on each other?"
            ) from error


def convertible(source: Holder, target: Holder) -> str:
    """Why KV of the one cannot become KV of the other; empty when it can."""
    try:
        plan(source.info.layout, target.info.layout, allow_unlike_weights=True)
    except LayoutMismatch as error:
        return str(error)
    return ""
