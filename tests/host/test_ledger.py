"""The book of blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.errors import PoolExhausted
from backends.host.ledger import Holder, Ledger


def holder(owner: str, reason: str = "decode") -> Holder:
    return Holder(reason, owner)


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    book = Ledger(4)
    blocks = book.take(2, holder("a"))
    book.share(blocks, holder("b"))
    assert book.release(holder("a")) == 0
    assert book.free == 2
    assert book.release(holder("b")) == 2
    assert book.free == 4


def test_a_failed_take_takes_nothing() -> None:
    book = Ledger(2)
    with pytest.raises(PoolExhausted, match="3 blocks wanted, 2 of 2 free"):
        book.take(3, holder("a"))
    assert book.free == 2
    assert book.holders() == ()


def test_moving_to_another_reason_never_frees() -> None:
    book = Ledger(3)
    book.take(3, holder("a", "landing"))
    book.move(holder("a", "landing"), holder("a", "quarantine"))
    assert book.free == 0
    assert book.holders() == (("quarantine", "a", 3),)


def test_a_free_block_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="free"):
        Ledger(2).share([0], holder("a"))


@pytest.mark.parametrize("breakage", ["lost", "twice", "idle", "kept"])
def test_the_audit_sees_a_book_that_does_not_balance(breakage: str) -> None:
    book = Ledger(4)
    book.take(2, holder("a"))
    if breakage == "lost":
        book._held.clear()
    elif breakage == "twice":
        book._free.append(0)
    elif breakage == "idle":
        book._idle[0] = None
    else:
        book._cached.add(3)
    assert book.audit()


def test_a_cached_block_is_shown_and_stays_when_its_last_holder_lets_go() -> None:
    book, gone = Ledger(3), list[int]()
    book.evicted = gone.append
    book.take(2, holder("a"))
    book.cache(0)
    assert book.holders()[-1] == ("cached", "0 of them idle", 1)
    assert book.release(holder("a")) == 2
    assert book.holders() == (("cached", "1 of them idle", 1),)
    assert book.free == 3
    assert (book.take(2, holder("b")), gone) == ([1, 2], [])
    book.share([0], holder("c"))
    with pytest.raises(PoolExhausted):
        book.take(1, holder("b"))
    book.release(holder("c"))
    assert (book.take(1, holder("b")), gone) == ([0], [0])
    assert not book.audit()


class Books(RuleBasedStateMachine):
    """Whatever is done to it, the book balances and agrees with a naive one."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Ledger(12)
        self.naive: dict[str, list[int]] = {}

    @rule(owner=st.sampled_from("abcd"), count=st.integers(0, 6))
    def take(self, owner: str, count: int) -> None:
        try:
            blocks = self.book.take(count, holder(owner))
        except PoolExhausted:
            assert count > self.book.free
        else:
            self.naive.setdefault(owner, []).extend(blocks)

    @precondition(lambda self: any(self.naive.values()))
    @rule(data=st.data(), owner=st.sampled_from("efgh"))
    def share(self, data: st.DataObject, owner: str) -> None:
        source = data.draw(st.sampled_from([blocks for blocks in self.naive.values() if blocks]))
        self.book.share(source, holder(owner))
        self.naive.setdefault(owner, []).extend(source)

    @rule(owner=st.sampled_from("abcdefgh"))
    def release(self, owner: str) -> None:
        self.book.release(holder(owner))
        self.naive.pop(owner, None)

    @rule(old=st.sampled_from("abcd"), new=st.sampled_from("efgh"))
    def move(self, old: str, new: str) -> None:
        self.book.move(holder(old), holder(new))
        self.naive.setdefault(new, []).extend(self.naive.pop(old, []))

    @invariant()
    def balances(self) -> None:
        assert self.book.audit() == []
        held = {block for blocks in self.naive.values() for block in blocks}
        assert self.book.free == 12 - len(held)


TestBooks = Books.TestCase


@given(st.integers(1, 40), st.integers(0, 40))
def test_blocks_come_lowest_first_so_that_runs_stay_adjacent(pool: int, count: int) -> None:
    book = Ledger(pool)
    if count <= pool:
        assert book.take(count, holder("a")) == list(range(count))
