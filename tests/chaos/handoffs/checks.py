"""The invariants: what is looked at whenever something happens, and what it is compared with.

Each check blames the handoff or worker at once, so that the story ends where the promise broke.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.host.ledger import Holder
from backends.protocol import First
from tests.chaos.handoffs import plot, truth
from tests.chaos.machine import Violation
from transfer.convert import Frame
from transfer.landings import Expected
from transfer.layout import Epoch

if TYPE_CHECKING:
    from tests.chaos.handoffs.game import Game
    from tests.chaos.handoffs.handoff import Handoff
    from tests.chaos.handoffs.workers import Decode, Worker


class Checks:
    """All that is looked at in one game."""

    def __init__(self, game: Game) -> None:
        self._game = game
        self._layout = game.layout
        self._claimed: set[str] = set()

    @cached_property
    def _block_of_item(self) -> Any:
        """Which block each number of a decode pool belongs to."""
        items = plot.TARGET_BLOCKS * self._layout.block_bytes // self._layout.item_bytes
        blocks = np.zeros(items, dtype=truth.WORDS[self._layout.dtype])
        table = truth.table(blocks, self._layout, plot.TARGET_BLOCKS)
        table[:] = np.arange(plot.TARGET_BLOCKS)[:, None, None, None, None, None]
        return blocks

    def claim(self, entry: Expected, epoch: Epoch, secret: bytes) -> None:
        """A right was accepted: it must be the one that was given."""
        landing = entry.landing
        if epoch != landing.epoch:
            self._game.blame(
                f"landing {landing.id}: accepted epoch {epoch}, given was {landing.epoch}"
            )
        if secret != landing.secret:
            self._game.blame(f"landing {landing.id}: accepted a wrong secret")
        if landing.id in self._claimed:
            self._game.blame(f"landing {landing.id}: a second writer was accepted")
        self._claimed.add(landing.id)

    def write(self, worker: Decode, entry: Expected, frame: Frame) -> None:
        """A frame is about to land: its blocks must still be set aside for its landing."""
        handoff = self._game.by_landing[entry.landing.id]
        if worker.dead or handoff.reserved is None:
            return
        if handoff.received == "admitted":
            self._game.blame(f"{handoff}: a write landed after it was admitted")
        held = worker.ledger._held
        mine = {
            *held.get(handoff.reserved.holder, ()),
            *held.get(handoff.quarantine, ()),
        }
        for block in blocks_of(frame, self._block_of_item, self._layout.item_bytes):
            if block not in mine:
                self._game.blame(
                    f"{handoff}: a write landed in block {block}, which is not its own"
                )

    def arrival(self, worker: Decode, handoff: Handoff, firsts: tuple[First, ...]) -> None:
        """A prefix is admitted: it must be right to the bit, and by its own proof."""
        assert handoff.reserved is not None
        if handoff.forged and not handoff.outrun:
            self._game.blame(f"{handoff}: admitted on a proof that is not its own")
        if firsts != handoff.firsts:
            self._game.blame(f"{handoff}: admitted with the first tokens {firsts}")
        self.pool(worker, handoff, handoff.reserved.landing.blocks, "when admitted")

    def pool(self, worker: Decode, handoff: Handoff, blocks: Any, when: str) -> None:
        """Compare every number of a prefix with what was computed."""
        tokens = truth.tokens_of(handoff.prompt)
        found = worker.table[truth.places(blocks, tokens, self._layout.block_tokens)]
        wrong = np.argwhere(found != truth.words_of(handoff.prompt, self._game.number))
        if len(wrong):
            self._game.blame(
                f"{handoff}: {len(wrong)} numbers differ {when}, the first at {wrong[0]}"
            )

    def books(self, worker: Worker) -> None:
        """Every block is free or has one owner, or several sequences that share it."""
        if worker.dead:
            return
        wrong = worker.ledger.audit() + over_the_cap(worker)
        owners: dict[int, Holder] = {}
        shared: set[int] = set()
        for holder, blocks in worker.ledger._held.items():
            if holder.reason in ("decode", "reused"):
                shared.update(blocks)
                continue
            for block in blocks:
                if owners.setdefault(block, holder) is not holder:
                    wrong.append(f"block {block} has two owners")
        wrong += [f"block {block} is written to and used" for block in shared & owners.keys()]
        unknown = worker.ledger._cached & owners.keys()
        wrong += [f"block {block} is written to and kept" for block in unknown]
        if wrong:
            self._game.blame(f"{worker}: {'; '.join(wrong)}")

    def kept(self, handoff: Handoff, code: str) -> None:
        """A landing failed: not for what was there already, to which nobody does any harm here."""
        if code == "KeptChanged":
            self._game.blame(f"{handoff}: a block that was kept has changed")

    def ending(self, handoff: Handoff, struck: bool) -> None:
        """It ended once on either side; well if nothing struck it, unless `struck` others used up
        the room."""
        ended = f"{handoff}: sent {handoff.sent}, received {handoff.received}"
        if handoff.sent is None or handoff.received is None:
            raise Violation(f"{ended}: it has not ended")
        if handoff.closed > 1:
            raise Violation(f"{handoff}: closed {handoff.closed} times")
        good = (handoff.sent, handoff.received) == ("handed", "admitted")
        if not good and not (handoff.disturbed or (handoff.sent == "refused" and struck)):
            raise Violation(f"{ended}, although nothing struck it")


def over_the_cap(worker: Worker) -> list[str]:
    """Which prefill workers may write to more of a pool than they may, landings and quarantine."""
    written: Counter[str] = Counter()
    landings = getattr(worker, "landings", None)
    for reserved in landings._open.values() if landings is not None else ():
        written[reserved.prefill] += len(reserved.landing.awaited)
    for holder, blocks in worker.ledger._held.items():
        if holder.reason == "quarantine":
            written[holder.owner.rpartition(" ")[2]] += len(blocks)
    return [
        f"{who} may write to {count} blocks"
        for who, count in written.items()
        if count > plot.CAP_BLOCKS
    ]


def blocks_of(frame: Frame, block_of_item: Any, item_bytes: int) -> Iterable[int]:
    """The blocks that a frame touches."""
    touched: set[int] = set()
    for offset, length in zip(frame.offsets.tolist(), frame.lengths.tolist(), strict=True):
        first, last = offset // item_bytes, (offset + length - 1) // item_bytes
        touched.update(np.unique(block_of_item[first : last + 1]).tolist())
    return touched
