"""What a landing that was granted holds, until it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backends.host.ledger import Holder
from backends.host.prefixes import Kept
from backends.host.staging import Staging
from backends.host.work import Held
from backends.protocol import RequestSpec
from transfer.contract import Receiver
from transfer.layout import Landing
from transfer.sharded import Piece, pieces


@dataclass(slots=True, eq=False)
class Staged:
    """A landing for codes: `holder` holds its blocks in the staging pool's own ledger.

    Once they are being decoded, nobody may give back what they are decoded into.
    """

    staging: Staging
    holder: Holder
    decoding: bool = False


@dataclass(slots=True, eq=False)
class Reserved:
    """A landing that was granted and has not ended yet.

    `kept` are the blocks that it has already, held by `reused` as long as it lasts. `blocks` are
    those that are to hold the prefix: the landing's own, or where it is `staged` those of the pool
    that its codes are decoded into.
    """

    held: Held
    spec: RequestSpec
    landing: Landing
    holder: Holder
    headroom: Holder
    expires: float
    deadline: float
    prefill: str
    receivers: tuple[Receiver, ...]
    reused: Holder
    kept: list[Kept]
    links: list[bytes]
    blocks: list[int]
    staged: Staged | None = None

    def places(self) -> Iterator[tuple[Receiver, Piece]]:
        """Every receiver, with each piece of the landing that is for its pool."""
        for piece in pieces(self.landing):
            for receiver in self.receivers:
                if receiver.endpoint.shard == piece.target:
                    yield receiver, piece
