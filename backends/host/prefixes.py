"""Finished blocks that are kept for later prefixes, until their room is needed.

An entry is one full block, found by its link (see `backends.chain`); it stands for a prefix only
together with the entries before it, so that one that goes takes those after it along. What is kept
is shared by any number of holders and written to by nobody.

Each entry has a proof: what the block held when it was admitted or computed. It is not given to
anybody without one, and whoever is given it has the block looked at again before its KV counts: a
bit that flipped meanwhile, or a block that was kept under a wrong name, costs a prefill and gives
no wrong token.

Knows neither requests nor how a proof is made. On the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from backends.chain import mark
from backends.host.ledger import Ledger
from transfer.contract import Proof


@dataclass(slots=True, eq=False)
class Kept:
    """A block that is kept under its link, as number `place` of its prefix.

    Without a proof it is not shared yet.
    """

    link: bytes
    block: int
    place: int
    before: Kept | None
    after: set[Kept] = field(default_factory=set)
    proof: Proof | None = None
    gone: bool = False


class Prefixes:
    """All entries of one worker. `changed` is called when what is shared has changed."""

    def __init__(self, ledger: Ledger, changed: Callable[[], None]) -> None:
        self._ledger = ledger
        self._changed = changed
        self._by_link: dict[bytes, Kept] = {}
        self._by_block: dict[int, Kept] = {}
        self._news: dict[int, bool] = {}
        ledger.evicted = self._evicted

    def __len__(self) -> int:
        return len(self._by_link)

    def find(self, links: Sequence[bytes], most: int) -> list[Kept]:
        """The proven entries of the longest beginning, at most so many. Share them at once."""
        found: list[Kept] = []
        for link in links[:most]:
            entry = self._by_link.get(link)
            if entry is None or entry.proof is None:
                break
            found.append(entry)
        return found

    def keep(
        self, links: Sequence[bytes], blocks: Sequence[int], proofs: Sequence[Proof] = ()
    ) -> list[Kept]:
        """Keep the blocks of a prefix, which somebody holds; `proofs` are those of the last ones.

        Returns the new entries that have no proof yet. What is kept already stays as it is.
        """
        unproven: list[Kept] = []
        before: Kept | None = None
        first = len(links) - len(proofs)
        for place, link in enumerate(links):
            entry = self._by_link.get(link)
            if entry is None:
                entry = self._enter(link, blocks[place], place, before)
                if place >= first:
                    self.prove(entry, proofs[place - first])
                else:
                    unproven.append(entry)
            before = entry
        return unproven

    def prove(self, entry: Kept, proof: Proof) -> None:
        """From now on an entry may be shared, if it is still kept."""
        if not entry.gone:
            entry.proof = proof
            self._tell(entry, True)

    def forget(self, entries: Iterable[Kept]) -> None:
        """Keep these no longer, nor what comes after them."""
        left = list(entries)
        while left:
            entry = left.pop()
            if entry.gone:
                continue
            entry.gone = True
            left += entry.after
            if entry.before is not None:
                entry.before.after.discard(entry)
            del self._by_link[entry.link], self._by_block[entry.block]
            self._ledger.uncache(entry.block)
            if entry.proof is not None:
                self._tell(entry, False)

    def forget_blocks(self, blocks: Iterable[int]) -> None:
        """Keep these blocks no longer, whatever they are kept as."""
        self.forget([self._by_block[it] for it in blocks if it in self._by_block])

    def marks(self) -> list[int]:
        """The marks of all that is shared."""
        return [mark(it.link) for it in self._by_link.values() if it.proof is not None]

    def news(self) -> tuple[list[int], list[int]]:
        """Marks of what has been shared since the last call, and of what is no more."""
        news, self._news = self._news, {}
        return [it for it, now in news.items() if now], [it for it, now in news.items() if not now]

    def _enter(self, link: bytes, block: int, place: int, before: Kept | None) -> Kept:
        if block in self._by_block:
            raise ValueError(f"block {block} is kept already, as something else")
        entry = Kept(link, block, place, before)
        if before is not None:
            before.after.add(entry)
        self._by_link[link] = self._by_block[block] = entry
        self._ledger.cache(block)
        return entry

    def _evicted(self, block: int) -> None:
        self.forget([self._by_block[block]])

    def _tell(self, entry: Kept, shared: bool) -> None:
        told = mark(entry.link)
        if self._news.get(told) == (not shared):
            del self._news[told]  # there and gone before anybody heard of it, or the other way
        else:
            self._news[told] = shared
        self._changed()
