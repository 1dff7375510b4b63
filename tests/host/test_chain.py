"""Names for prefixes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.chain import chain, mark
from transfer.stage import TARGET

TOKENS = list(range(1, 20))  # four blocks of four, and three tokens


def test_there_is_a_link_for_each_full_block() -> None:
    assert [len(chain(TARGET, b"s", TOKENS[:count])) for count in (0, 3, 4, 7, 8, 19)] == [
        0, 0, 1, 1, 2, 4,
    ]  # fmt: skip


def test_a_link_stands_for_all_tokens_before_it() -> None:
    before = chain(TARGET, b"s", TOKENS)
    after = chain(TARGET, b"s", [7, *TOKENS[1:]])
    assert not set(before) & set(after)
    assert chain(TARGET, b"s", [*TOKENS[:8], 9, 9, 9, 9])[:2] == before[:2]


@pytest.mark.parametrize(
    ("layout", "salt"),
    [
        (TARGET, b"t"),
        (TARGET, b""),
        (msgspec.structs.replace(TARGET, model="another"), b"s"),
        (msgspec.structs.replace(TARGET, weights="another"), b"s"),
        (msgspec.structs.replace(TARGET, dtype="float16"), b"s"),
    ],
)
def test_other_layouts_and_salts_have_no_link_in_common(layout, salt: bytes) -> None:
    assert not set(chain(TARGET, b"s", TOKENS)) & set(chain(layout, salt, TOKENS))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 10))
def test_a_chain_that_was_begun_goes_on_as_one_made_at_once(tokens: list[int], known: int) -> None:
    whole = chain(TARGET, b"s", tokens)
    assert chain(TARGET, b"s", tokens, whole[:known]) == whole


def test_a_mark_is_64_bits_of_its_link() -> None:
    links = chain(TARGET, b"s", TOKENS)
    assert len({mark(link) for link in links}) == len(links)
    assert all(0 <= mark(link) < 1 << 64 for link in links)
