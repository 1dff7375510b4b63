"""Blocks that are kept for later prefixes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.chain import chain, mark
from backends.errors import PoolExhausted
from backends.host.ledger import Holder, Ledger
from backends.host.prefixes import Kept, Prefixes
from transfer.contract import Proof
from transfer.stage import TARGET

SIZE = TARGET.block_tokens
BLOCKS = 8


def links(tokens: str, salt: bytes = b"s") -> list[bytes]:
    """A block of equal tokens for each letter."""
    return chain(TARGET, salt, [ord(letter) for letter in tokens for _ in range(SIZE)])


def proofs(count: int) -> list[Proof]:
    return [Proof(b"k", bytes([number])) for number in range(count)]


class Desk:
    def __init__(self) -> None:
        self.ledger = Ledger(BLOCKS)
        self.news = 0
        self.prefixes = Prefixes(self.ledger, self._changed)
        self._owner = 0

    def _changed(self) -> None:
        self.news += 1

    def holder(self) -> Holder:
        self._owner += 1
        return Holder("decode", str(self._owner))

    def use(self, tokens: str, salt: bytes = b"s") -> tuple[Holder, list[int]]:
        """Share what is there of a prefix, compute the rest, keep all of it."""
        holder, names = self.holder(), links(tokens, salt)
        found = self.prefixes.find(names, len(names))
        self.ledger.share([it.block for it in found], holder)
        blocks = [it.block for it in found] + self.ledger.take(len(names) - len(found), holder)
        self.prefixes.keep(names, blocks, proofs(len(names) - len(found)))
        assert not self.ledger.audit()
        return holder, blocks

    def found(self, tokens: str, salt: bytes = b"s") -> int:
        return len(self.prefixes.find(links(tokens, salt), BLOCKS))


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_what_was_kept_is_found_up_to_where_the_tokens_differ(desk: Desk) -> None:
    holder, blocks = desk.use("abc")
    assert [it.block for it in desk.prefixes.find(links("abx"), 9)] == blocks[:2]
    assert desk.found("xbc") == 0
    assert desk.found("abc", b"another tenant") == 0
    desk.ledger.release(holder)
    assert (desk.ledger.free, desk.found("abcd")) == (BLOCKS, 3)


def test_a_block_without_a_proof_is_not_found(desk: Desk) -> None:
    blocks = desk.ledger.take(2, desk.holder())
    unproven = desk.prefixes.keep(links("ab"), blocks)
    assert (len(unproven), desk.found("ab"), desk.news) == (2, 0, 0)
    desk.prefixes.prove(unproven[0], Proof(b"k", b"d"))
    assert desk.found("ab") == 1


def test_what_is_idle_counts_as_free_and_goes_before_anything_is_refused(desk: Desk) -> None:
    holder, _ = desk.use("abcd")
    desk.ledger.release(holder)
    other = desk.holder()
    desk.ledger.take(BLOCKS - 1, other)
    assert (desk.ledger.free, desk.found("abcd")) == (1, 1)
    with pytest.raises(PoolExhausted, match="2 blocks wanted, 1 of 8 free"):
        desk.ledger.take(2, desk.holder())
    desk.ledger.take(1, other)
    assert (desk.found("abcd"), len(desk.prefixes)) == (0, 0)
    assert not desk.ledger.audit()


def test_what_was_used_longest_ago_goes_first_and_its_end_before_its_beginning(desk: Desk) -> None:
    for tokens in ("abc", "xyz", "ab"):
        desk.ledger.release(desk.use(tokens)[0])
    for count, left in ((3, (2, 3)), (4, (2, 2)), (5, (2, 1)), (6, (2, 0)), (7, (1, 0))):
        holder = desk.holder()
        desk.ledger.take(count, holder)
        assert (desk.found("abc"), desk.found("xyz")) == left, count
        desk.ledger.release(holder)


def test_what_somebody_holds_is_never_taken(desk: Desk) -> None:
    holder, blocks = desk.use("abcd")
    desk.ledger.take(BLOCKS - 4, desk.holder())
    with pytest.raises(PoolExhausted):
        desk.ledger.take(1, desk.holder())
    assert [it.block for it in desk.prefixes.find(links("abcd"), 9)] == blocks
    desk.ledger.release(holder)


def test_a_block_that_was_computed_twice_is_kept_once(desk: Desk) -> None:
    _, blocks = desk.use("ab")
    twin = desk.holder()
    again = desk.ledger.take(3, twin)
    assert len(desk.prefixes.keep(links("abc"), again)) == 1
    assert [it.block for it in desk.prefixes.find(links("ab"), 9)] == blocks
    desk.ledger.release(twin)
    assert desk.ledger.free == BLOCKS - 2
    assert not desk.ledger.audit()


def test_who_goes_takes_along_what_comes_after(desk: Desk) -> None:
    first, _ = desk.use("ab")
    second, blocks = desk.use("abcd")
    desk.prefixes.forget_blocks(blocks[1:2])
    assert (desk.found("abcd"), len(desk.prefixes)) == (1, 1)
    for holder in (first, second):
        desk.ledger.release(holder)
    assert (desk.ledger.free, len(desk.ledger._free)) == (BLOCKS, BLOCKS - 1)
    desk.prefixes.forget_blocks([0, 1, 2, 3])
    assert len(desk.ledger._free) == BLOCKS


def test_a_proof_that_comes_too_late_is_of_no_use(desk: Desk) -> None:
    holder = desk.holder()
    (entry,) = desk.prefixes.keep(links("a"), desk.ledger.take(1, holder))
    desk.ledger.release(holder)
    desk.ledger.take(BLOCKS, desk.holder())
    desk.prefixes.prove(entry, Proof(b"k", b"d"))
    assert (desk.found("a"), desk.prefixes.marks()) == (0, [])


def test_a_block_is_not_kept_as_two_things(desk: Desk) -> None:
    _, blocks = desk.use("a")
    with pytest.raises(ValueError, match="kept already"):
        desk.prefixes.keep(links("b"), blocks)
    with pytest.raises(ValueError, match="not held"):
        desk.ledger.cache(7)


def test_news_are_what_has_changed_on_the_whole(desk: Desk) -> None:
    one, two, three = (mark(it) for it in links("abc"))
    desk.use("ab")
    assert desk.prefixes.news() == ([one, two], [])
    desk.use("abc")
    desk.prefixes.forget(desk.prefixes.find(links("abc"), 9)[1:])
    assert desk.prefixes.news() == ([], [two])
    assert desk.prefixes.news() == ([], [])
    assert desk.prefixes.marks() == [one]
    assert three not in desk.prefixes.marks()


class Keeping(RuleBasedStateMachine):
    """Prefixes come, share, end and are evicted; no block is lost, and none holds two things."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.running: list[tuple[Holder, list[int], str, bytes]] = []
        self.unproven: list[tuple[Kept, Any]] = []
        self.content: dict[int, Any] = {}
        self.told: set[int] = set()

    @rule(
        tokens=st.text("ab", min_size=1, max_size=4),
        salt=st.sampled_from([b"x", b"y"]),
        proven=st.booleans(),
        most=st.integers(0, 4),
    )
    def begin(self, tokens: str, salt: bytes, proven: bool, most: int) -> None:
        desk, names = self.desk, links(tokens, salt)
        holder = desk.holder()
        found = desk.prefixes.find(names, most)
        for place, entry in enumerate(found):
            assert self.content[entry.block] == (salt, tokens[: place + 1])
        shared = [it.block for it in found]
        desk.ledger.share(shared, holder)
        try:
            fresh = desk.ledger.take(len(names) - len(found), holder)
        except PoolExhausted:
            assert len(names) - len(found) > desk.ledger.free
            desk.ledger.release(holder)
            return
        busy = {block for _, blocks, _, _ in self.running for block in blocks}
        assert not busy & set(fresh), "a block that somebody uses was given away"
        assert not set(shared) & set(fresh)
        blocks = shared + fresh
        self.content |= {block: (salt, tokens[: place + 1]) for place, block in enumerate(blocks)}
        self.running.append((holder, blocks, tokens, salt))
        new = desk.prefixes.keep(names, blocks, proofs(len(fresh)) if proven else ())
        self.unproven += [(entry, self.content[entry.block]) for entry in new]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.running))
        self.running.remove(one)
        self.desk.ledger.release(one[0])

    @precondition(lambda self: self.unproven)
    @rule(data=st.data())
    def prove(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.unproven))
        self.unproven.remove(one)
        self.desk.prefixes.prove(one[0], Proof(b"k", b"d"))

    @rule(blocks=st.sets(st.integers(0, BLOCKS - 1), max_size=2))
    def forget(self, blocks: set[int]) -> None:
        self.desk.prefixes.forget_blocks(blocks)

    @rule()
    def hear(self) -> None:
        added, removed = self.desk.prefixes.news()
        assert not self.told & set(added)
        assert self.told >= set(removed)
        self.told = self.told - set(removed) | set(added)
        assert self.told == set(self.desk.prefixes.marks())

    @invariant()
    def balances(self) -> None:
        ledger, prefixes = self.desk.ledger, self.desk.prefixes
        assert ledger.audit() == []
        held = {block for _, blocks, _, _ in self.running for block in blocks}
        assert ledger.free == BLOCKS - len(held)
        kept = list(prefixes._by_link.values())
        assert {it.block for it in kept} == set(prefixes._by_block) == ledger._cached
        assert len({it.block for it in kept}) == len(kept)
        for entry in kept:
            assert not entry.gone
            assert entry.before is None or prefixes._by_link[entry.before.link] is entry.before


TestKeeping = Keeping.TestCase


@given(st.integers(1, 6), st.integers(1, 6))
def test_the_rest_of_a_prefix_is_kept_under_what_was_there(first: int, second: int) -> None:
    desk = Desk()
    tokens = "abcdef"
    desk.ledger.release(desk.use(tokens[:first])[0])
    desk.ledger.release(desk.use(tokens[:second])[0])
    assert desk.found(tokens) == max(first, second)
    assert len(desk.prefixes) == max(first, second)
